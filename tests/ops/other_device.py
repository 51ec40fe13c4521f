"""A device that is neither CPU nor CUDA, computes by PyTorch's operators alone, and has no float64, as Apple's have.

A program: the registration holds for a whole process. It prints what the operator gave there.
"""

import torch
from backend_cases import CASES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from wide_cases import KINDS, LAYOUTS, arguments, run

import icnn_zoo
from icnn_zoo.ops import formula
from icnn_zoo.ops.geometry import Geometry, pair, resolve_padding
from icnn_zoo.ops.sharing import expand_shapes
from icnn_zoo.ops.torch_backend.dense import measure_box

NAME = "privateuseone"
KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)


class There(torch.Tensor):
    """A tensor on the device: its numbers lie in a twin on the CPU."""

    @staticmethod
    def __new__(cls, twin: Tensor):
        if twin.dtype == torch.float64:
            raise TypeError("there is no float64 on this device")
        options = {"dtype": twin.dtype, "device": NAME, "strides": twin.stride()}
        made = torch.Tensor._make_wrapper_subclass(cls, twin.size(), **options)
        made.twin = twin
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func}: the device's mode is off")


class Device(TorchDispatchMode):
    """Runs operators on the twins; an operator of the package by what is registered for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func.namespace == "icnn_zoo":
            with self:
                return func.redispatch(KEYS, *args, **kwargs)
        originals = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, There)]
        there = bool(originals)
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == NAME
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map(lambda item: item.twin if isinstance(item, There) else item, (args, kwargs))
        result = func(*args, **kwargs)
        if not there:
            return result
        known = {id(original.twin): original for original in originals}  # what works in place returns its argument
        return tree_map(
            lambda item: known[id(item)] if id(item) in known else There(item) if isinstance(item, Tensor) else item,
            result,
        )


def main() -> None:
    _setup_privateuseone_for_python_backend()
    convolve, differentiate = torch.ops.icnn_zoo.irregular_conv2d, torch.ops.icnn_zoo.irregular_conv2d_backward
    for case in CASES:
        tensors = [tensor.detach() for tensor in case.tensors(torch.float32)]
        tensors[2] = expand_shapes(tensors[2], tensors[0].shape[1])  # the operator takes them written out
        bias = tensors[3] if case.bias else None
        stride, dilation = pair("stride", case.stride, 1), pair("dilation", case.dilation, 1)
        padding = resolve_padding(case.padding, case.kernel, stride, dilation)
        sizes = (stride, padding, dilation, case.groups)
        output = convolve(*tensors[:3], bias, *sizes, "torch")
        expected = (output, *differentiate(output, *tensors[:3], *sizes, [True] * 3, "torch"))
        with Device():
            there = [There(tensor) for tensor in tensors]
            output = case.run(there)  # the public function, with all its checks
            grads = differentiate(output, *there[:3], *sizes, [True] * 3, "auto")
            plain = formula.irregular_conv2d(*there[:3], there[3] if case.bias else None, *sizes)
        results = [output, *grads, plain]
        assert all(result.device.type == NAME for result in results)
        for result, truth in zip(results, (*expected, expected[0]), strict=True):
            torch.testing.assert_close(result.twin, truth, rtol=1e-4, atol=1e-3)
    for kind in KINDS:
        for layout in LAYOUTS:
            tensors = [tensor.detach().float() for tensor in arguments(kind, layout)]
            with Device():
                output = run([There(tensor) for tensor in tensors], kind, layout, 1, None, "auto")
                taps = There(torch.cat(tensors[2:4], dim=-1))
                geometry = Geometry.of((4, 5), (2, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2, kind)
                assert measure_box(taps, geometry) is not None  # so that kernels are drawn
            truth = run(tensors, kind, layout, 1, None, "torch")
            torch.testing.assert_close(output.twin, truth, rtol=1e-4, atol=1e-4)
    layer = icnn_zoo.IrregularConv2d(2, 3, 3)
    with Device():
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, torch.nn.Parameter(There(parameter.detach())))
        print(layer(There(torch.ones(1, 2, 5, 5))).device)
        try:
            icnn_zoo.irregular_conv2d(*there[:3], None, *sizes[:1], case.padding, *sizes[2:], backend="native")
        except RuntimeError as error:
            print(error)
    print(f"{len(CASES)} cases")


if __name__ == "__main__":
    main()
