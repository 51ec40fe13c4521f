"""The native backend's way to its compiled kernel, and what it gives to C."""

import copy
import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from backend_cases import CASES, Case, gradients, oracle

import icnn_zoo
from icnn_zoo.ops import backends, kernel_cache
from icnn_zoo.ops.geometry import Geometry
from icnn_zoo.ops.native_backend import Limits, NativeBackend, boxes, build, dense
from icnn_zoo.ops.native_backend.boxes import choose_box
from icnn_zoo.ops.native_backend.picks import Picks

if sys.platform != "linux" or shutil.which("cc") is None:
    pytest.skip("no Linux, or no C compiler", allow_module_level=True)

CALL = {"input": torch.ones(1, 2, 4, 5), "weight": torch.ones(3, 2, 1, 1), "positions": torch.zeros(2, 1, 2)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, for a process that has loaded nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "load", build.load.__wrapped__)
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))  # compiles in no time
    return tmp_path / "cache" / "icnn_zoo" / "native"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that another process has filled: what is loaded here could not be damaged without harm."""
    home = tmp_path_factory.mktemp("compiled")
    code = (
        "from icnn_zoo.ops.native_backend import build; build.FLAGS = ('-O0', *build.FLAGS[1:]);"
        "assert build.load()[1] is None"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CC"}
    subprocess.run([sys.executable, "-c", code], env={**environment, "XDG_CACHE_HOME": str(home)}, check=True)
    return home / "icnn_zoo" / "native"


def works() -> bool:
    libraries, reason = build.load()
    return reason is None and len(libraries) == 2


def test_with_a_compiler_the_native_backend_runs_on_linux() -> None:
    assert backends.choose_backend("auto", torch.device("cpu"), torch.float32) == "native"


def test_the_cache_is_its_owners_alone_and_used_again(cache: Path, compiled: Path) -> None:
    shutil.copytree(compiled, cache)
    files = sorted(cache.iterdir())
    assert [file.suffix for file in files] == [".so", ".so"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in (cache, *files))
    times = [file.stat().st_mtime_ns for file in files]
    assert works()
    assert [file.stat().st_mtime_ns for file in sorted(cache.iterdir())] == times


def empty(file: Path) -> None:
    file.write_bytes(b"")


def truncate(file: Path) -> None:
    os.truncate(file, 4096)


def change(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def open_to_all(file: Path) -> None:
    file.chmod(0o777)


def link(file: Path) -> None:
    elsewhere = file.rename(file.with_suffix(".elsewhere"))
    file.symlink_to(elsewhere)


def give_away(file: Path) -> None:
    os.chown(file, 12345, 12345)


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o700)


@pytest.mark.parametrize("damage", [empty, truncate, change, open_to_all, link, give_away, pipe])
def test_a_library_that_is_not_whole_or_not_the_users_is_compiled_anew(cache: Path, compiled: Path, damage) -> None:
    shutil.copytree(compiled, cache)
    file = next(cache.iterdir())
    if damage is give_away and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    damage(file)
    assert kernel_cache.read_intact(file) is None
    assert works()
    assert kernel_cache.read_intact(file) is not None


def close(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def occupy(folder: Path) -> None:
    folder.parent.parent.mkdir()
    folder.parent.write_text("a file where a folder should be")


@pytest.mark.parametrize("spoil", [close, occupy])
def test_without_a_cache_of_its_own_it_compiles_in_a_temporary_folder_and_warns_once(
    cache: Path, spoil, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spoil(cache)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.warns(RuntimeWarning, match=r"compiles its C kernel in a temporary folder.*Set XDG_CACHE_HOME") as seen:
        assert works()
    assert len(seen) == 1
    assert not list(tmp_path.glob("icnn_zoo-*"))


def test_no_home_folder_is_no_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.warns(RuntimeWarning, match="temporary folder, for this process only: Could not determine home"):
        assert works()


@pytest.mark.parametrize("options", ["cc -m64", "{launcher} cc", "'{launcher}' cc -m64 -DUNUSED='a b'"])
def test_cc_may_hold_options_and_a_launcher(
    cache: Path, options: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    if "m64" in options and os.uname().machine != "x86_64":
        pytest.skip("-m64 is an option for x86")
    monkeypatch.setenv("CC", options.format(launcher=launcher))
    assert works()


def script(text: str):
    def make(folder: Path) -> str:
        compiler = folder / "broken-cc"
        compiler.write_text(f"#!/bin/sh\n{text}\n")
        compiler.chmod(0o755)
        return str(compiler)

    return make


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (script('[ "$1" = --version ] && exit 0\necho "no such processor" >&2\nexit 1'), "broken-cc' failed: no such"),
        (script("exit 1"), "broken-cc --version' .*|compiling it with .*broken-cc' failed: "),
        (lambda folder: "/none/cc", "compiling it with '/none/cc' failed: .*No such file"),
        (lambda folder: "cc '", r"\$CC, \"cc '\", is not a command line"),
    ],
    ids=["cannot compile", "cannot run", "is not there", "cannot be read"],
)
def test_a_compiler_that_fails_is_told_once_and_leaves_nothing(
    cache: Path, compiler, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path))
    with pytest.warns(RuntimeWarning, match=f"without its native backend, up to 14 times slower: .*{reason}"):
        output = icnn_zoo.irregular_conv2d(**CALL)
    assert torch.equal(output, icnn_zoo.irregular_conv2d(**CALL, backend="torch"))
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match=rf"'native' cannot run: .*{reason}"):
        icnn_zoo.irregular_conv2d(**CALL, backend="native")
    assert not list(cache.glob("*")) + list(cache.glob(".*"))


def test_without_a_compiler_the_torch_backend_computes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.warns(RuntimeWarning, match="it needs a C compiler on the first use"):
        assert backends.choose_backend("auto", torch.device("cpu"), torch.float32) == "torch"


def test_torch_installed_elsewhere_is_found_where_it_is_loaded() -> None:
    code = (
        "import torch; torch.__file__ = '/opt/elsewhere/torch/__init__.py';"
        "from icnn_zoo.ops.backends import choose_backend;"
        "print(choose_backend('auto', torch.device('cpu'), torch.half))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "native"


def test_leftovers_of_killed_compilations_go(cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    old, new = cache / ".native-float-0-1.so", cache / ".native-float-0-2.so"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert works()
    assert not old.exists()
    assert new.exists()  # somebody may be compiling it


ODD_BIASES = {
    "strided": lambda: torch.arange(6.0).reshape(3, 2)[:, 0],
    "expanded": lambda: torch.tensor([5.0]).expand(3),
    "reversed by a batch": lambda: torch.arange(6.0).reshape(2, 3).t().contiguous().t()[1],
}


@pytest.mark.parametrize("name", ODD_BIASES)
def test_the_strides_of_a_bias_count(name: str) -> None:
    bias = ODD_BIASES[name]()
    output = icnn_zoo.irregular_conv2d(torch.zeros(1, 2, 1, 1), *list(CALL.values())[1:], bias, backend="native")
    assert output.flatten().tolist() == bias.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((3, 8), {}),
        ((16, 16), {"groups": 4}),
        ((16, 16), {"groups": 4, "shapes": "group"}),
        ((6, 12), {"shapes": "kernel"}),
        ((6, 12), {"shapes": "kernel", "dilation": 3}),
        ((6, 12), {"shapes": "kernel", "interpolation": "gaussian"}),
        ((12, 12), {"groups": 12}),
        ((6, 24), {}),
    ],
)
def test_gradients_are_right_where_the_input_needs_none(sizes, options, dtype) -> None:
    """As in first layers and heads on frozen backbones; some taps are outside of the box the others are drawn into."""
    layer = icnn_zoo.IrregularConv2d(*sizes, 3, padding=2, bias=False, dtype=dtype, **options)
    layer.displacement.data += torch.rand_like(layer.displacement) * 0.9
    layer.displacement.data[0, ..., :2, :] += 6.0
    input = torch.randn(2, sizes[0], 14, 14, dtype=dtype)
    layer.backend = "native"
    rubbish = [torch.ones(layer.weight.numel() * size, dtype=torch.uint8) for size in (1, 1, 1, 4, 8, 16)]
    del rubbish  # what is not written shows
    found = torch.autograd.grad(layer(input).square().sum(), [layer.weight, layer.displacement])
    exact = copy.deepcopy(layer).double()
    exact.backend = "torch"  # the reference takes a minute for the larger ones
    truth = torch.autograd.grad(exact(input.double()).square().sum(), [exact.weight, exact.displacement])
    for by_native, by_operators in zip(found, truth, strict=True):
        difference = (by_native - by_operators).abs().max() / by_operators.abs().max()
        assert difference < (1e-5 if dtype == torch.float32 else 1e-12)


def test_lengths_of_more_than_32_bits_come_back_whole() -> None:
    sizes = {"height": 2**10, "width": 2**10, "out_height": 2**10, "out_width": 2**10, "stride_row": 1, "stride_col": 1}
    task = dense.Task(**sizes, images=1, channels=2**12, outputs=8, groups=1, rows=3, cols=3)
    for library in build.load()[0].values():
        assert library.planes_workspace_length(ctypes.byref(task), 0) > 2**32


def test_every_tensor_that_reaches_c_is_checked_there() -> None:
    """Whatever a backend of the package may do to its arguments first, C gets exactly what it will touch."""
    geometry = Geometry.of((4, 5), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    input, weight, positions = CALL["input"], CALL["weight"].flatten(2), CALL["positions"]
    native = NativeBackend(Limits(draw=False))
    with pytest.raises(ValueError, match=r"`bias` must be 3 contiguous numbers of torch.float32.*got \[2\]"):
        native.forward(input, weight, positions, torch.zeros(2), geometry)
    with pytest.raises(ValueError, match=r"`positions` must be 4 contiguous numbers of torch.float64"):
        native.forward(input, weight, positions[:, :, :1], None, geometry)
    with pytest.raises(ValueError, match=r"`input` must be 40 contiguous numbers"):
        native.forward(input[..., :4], weight, positions, None, geometry)
    with pytest.raises(ValueError, match=r"`grad_output` must be 60 contiguous numbers"):
        native.backward(torch.ones(1, 3, 4, 4), input, weight, positions, geometry, (True, True, True))
    with pytest.raises(ValueError, match=r"`weight` must be .* on a CPU .* on meta"):
        native.forward(input, weight.to("meta"), positions, None, geometry)
    with pytest.raises(ValueError, match="at least one of everything"):
        native.forward(input[:, :0], weight[:, :0], positions[:0], None, geometry)


@pytest.mark.parametrize("shapes", ["channel", "kernel"])
def test_a_tap_that_runs_away_leaves_the_others_in_their_box(shapes: str) -> None:
    case = Case(size=(9, 8), channels=(64, 32), groups=8, shapes=shapes, spread=0.2, batch=1)
    weight, positions = (tensor.detach() for tensor in case.tensors()[1:3])
    geometry = Geometry.of((9, 8), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 8)
    near = choose_box(weight.flatten(2), positions.clone(), geometry)
    positions.view(-1, 2)[4] += 5
    far = choose_box(weight.flatten(2), positions, geometry)
    assert near is not None
    assert far is not None
    for box in (near, far):
        box.forward(case.tensors()[0].detach(), None)
    assert (near.num_outliers, far.num_outliers) == (0, 4 if shapes == "channel" else 1)
    assert far.size == near.size
    assert int((far.drawn == 0).sum()) == far.num_outliers
    tensors = [tensor.detach() for tensor in case.tensors()]
    tensors[2] = positions
    expected = case.run(tensors, "torch")
    torch.testing.assert_close(case.run(tensors, "native"), expected)


FULL = [
    case
    for case in CASES
    if case.shapes == "kernel" and case.stride == 1 and case.batch > 0 and case.channels[0] > case.groups
]
PICKED = [
    *FULL,
    Case("groups, dilation 3", shapes="kernel", groups=2, dilation=3, padding=3, spread=0.3),
    Case("columns of several images", shapes="kernel", size=(3, 5), batch=9, channels=(3, 2)),
    Case("rows of one pixel", shapes="kernel", size=(9, 1), channels=(2, 3), dilation=2, padding=2),
    Case("a row of several columns, several ranges", shapes="kernel", size=(5, 200), channels=(2, 2), batch=1),
    Case("two taps", shapes="kernel", kernel=(1, 2), padding=(0, 1)),
    Case("outputs of two blocks", shapes="kernel", size=(2, 3), channels=(2, 130), batch=1),
    Case("channels of two blocks", shapes="kernel", size=(2, 3), channels=(130, 2), batch=1),
]


@pytest.fixture
def always_picked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is cheaper than picking; the test must have picked, forward and backward."""
    called: list[str] = []
    run = Picks._run

    def watched(self: Picks, what: str, *direction: int, **tensors: torch.Tensor | None) -> None:
        called.append(what)
        run(self, what, *direction, **tensors)

    monkeypatch.setattr(boxes, "PICK_COST", 0.0)
    monkeypatch.setattr(boxes, "COLUMN_COST", 0.0)
    monkeypatch.setattr(Picks, "_run", watched)
    yield
    assert set(called) == {"planes", "kernels"}


@pytest.mark.usefixtures("always_picked")
@pytest.mark.parametrize("case", PICKED, ids=lambda case: case.name)
def test_picked_taps_agree_with_the_reference(case: Case) -> None:
    expected, by_tensors = oracle(case)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        tensors = case.tensors(dtype)
        output = case.run(tensors, "native")
        found = (output, *gradients(output, tensors))
        for result, truth in zip(found, (expected, *by_tensors), strict=True):
            scale = max(1.0, truth.abs().max().item())
            torch.testing.assert_close(result.double(), truth, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.usefixtures("always_picked")
def test_moments_of_many_pixels_are_whole() -> None:
    case = Case(shapes="kernel", size=(90, 70), channels=(2, 2), batch=2, spread=0.5)
    tensors = case.tensors()
    expected = gradients(case.run(tensors, "torch"), tensors)
    for result, truth in zip(gradients(case.run(tensors, "native"), tensors), expected, strict=True):
        torch.testing.assert_close(result, truth)


@pytest.mark.parametrize(("dilation", "stride", "picked"), [(1, 1, False), (4, 1, True), (4, 2, None)])
def test_kernels_in_large_boxes_are_picked(dilation: int, stride: int, picked: bool | None) -> None:
    pair = (dilation, dilation)
    case = Case(size=(17, 17), channels=(32, 32), shapes="kernel", spread=0.1, dilation=dilation, padding=dilation)
    weight, positions = (tensor.detach() for tensor in case.tensors()[1:3])
    geometry = Geometry.of((17, 17), (3, 3), (stride, stride), (*pair, *pair), pair, 1)
    box = choose_box(weight.flatten(2), positions, geometry)
    assert (None if box is None else box.picked) == picked
