"""Guards that make later rewrites fail instead of silently dropping learned shapes.

Networks with branches for training (RepVGG, MobileOne, FastViT, ...) have methods that read the weights of their
convolutions and put new regular ones in their place, or look for ``nn.Conv2d`` to change. They know nothing of
positions. So :func:`icnn_zoo.convert` shadows these methods on the modules that hold a converted layer, by objects of
this module that raise: ordinary attributes of the instance, which are copied and pickled with it. ``icnn_zoo.deploy``
takes them off its copy.
"""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

from torch import nn

REWRITERS = ("fuse", "fuse_model", "reparameterize", "switch_to_deploy")
"""Methods that replace convolutions: timm's three, and torchvision's."""

SURGEONS = ("make_dilated", "set_in_channels")
"""Methods that change what is an ``nn.Conv2d``, and would pass over irregular layers: segmentation_models_pytorch's."""


class RewriteGuard:
    """Stands for a method that would build regular convolutions in place of irregular ones; calling it raises.

    Args:
        method: What it stands for, such as "RepVggBlock.reparameterize".
        layer: Dotted name of an irregular layer that the method would drop.
    """

    def __init__(self, method: str, layer: str) -> None:
        self.method = method
        self.layer = layer

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(
            f"{self.method} would replace irregular layers by regular convolutions and drop their learned shapes, "
            f"{self.layer!r} first. Reparameterize before converting (timm.utils.reparameterize_model, then "
            "icnn_zoo.convert); for inference, icnn_zoo.deploy folds shapes and norms into standard convolutions."
        )


class SurgeryGuard:
    """Stands for a method that would change regular convolutions and pass over irregular ones; calling it raises.

    Args:
        method: What it stands for, such as "ResNetEncoder.make_dilated".
        layer: Dotted name of an irregular layer that the method would pass over.
    """

    def __init__(self, method: str, layer: str) -> None:
        self.method = method
        self.layer = layer

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(
            f"{self.method} looks for nn.Conv2d and would pass over irregular layers, {self.layer!r} first. Call it "
            "before icnn_zoo.convert. Stride, padding and dilation of irregular layers can be set as attributes."
        )


class PatchSizeGuard:
    """Stands for ``set_input_size`` of a patch embedding: passes on all but a new patch size, which raises.

    Args:
        module: The patch embedding.
        layer: Dotted name of its irregular projection.
    """

    def __init__(self, module: nn.Module, layer: str) -> None:
        self.module = module
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind: Any = type(self.module)
        method = kind.set_input_size
        given = inspect.signature(method).bind(self.module, *args, **kwargs).arguments.get("patch_size")
        pair = given if given is None or isinstance(given, (tuple, list)) else (given, given)
        if pair is not None and tuple(pair) != tuple(self.module.patch_size):  # type: ignore[arg-type]
            raise RuntimeError(
                f"set_input_size(patch_size={given!r}) would make {self.layer!r} a regular convolution and drop its "
                "learned shapes. Set the patch size before converting; img_size may change at any time."
            )
        return method(self.module, *args, **kwargs)


def guard(model: nn.Module, names: list[str]) -> None:
    """Shadows the methods of all modules that hold one of these layers.

    Args:
        model: The converted network.
        names: Dotted names of the converted layers, under all their aliases.
    """
    for name in names:
        holder = name
        while holder:
            holder = holder.rpartition(".")[0]
            module = model.get_submodule(holder)
            for method in REWRITERS:
                if callable(getattr(type(module), method, None)) and method not in vars(module):
                    vars(module)[method] = RewriteGuard(f"{type(module).__name__}.{method}", name)
            for method in SURGEONS:
                if callable(getattr(type(module), method, None)) and method not in vars(module):
                    vars(module)[method] = SurgeryGuard(f"{type(module).__name__}.{method}", name)
        module = model.get_submodule(name.rpartition(".")[0])
        if (
            hasattr(type(module), "set_input_size")
            and hasattr(module, "patch_size")
            and "set_input_size" not in vars(module)
        ):
            vars(module)["set_input_size"] = PatchSizeGuard(module, name)


def unguard(model: nn.Module) -> None:
    """Takes the guards off all modules of a deployed network.

    There the methods that replace convolutions have nothing left to do, and would not know the standard forms: called
    without arguments they do nothing and return the module, which is what ``Module.eval`` does.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, RewriteGuard):
                vars(module)[name] = module.eval
            elif isinstance(value, (SurgeryGuard, PatchSizeGuard)):
                del vars(module)[name]
