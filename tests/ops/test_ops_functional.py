"""What `irregular_conv2d` refuses, and how it says so."""

import re
from typing import Any

import pytest
import torch

import icnn_zoo

# A good call: 4 input channels, 6 kernels of 3x3.
GOOD: dict[str, Any] = {
    "input": torch.zeros(2, 4, 8, 9),
    "weight": torch.zeros(6, 4, 3, 3),
    "positions": torch.zeros(4, 9, 2),
    "bias": torch.zeros(6),
}

BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "input of rank 2": ({"input": torch.zeros(8, 9)}, "`input`"),
    "input of rank 5": ({"input": torch.zeros(1, 2, 4, 8, 9)}, "`input`"),
    "weight of rank 3": ({"weight": torch.zeros(6, 4, 9)}, "`weight`"),
    "channels": ({"input": torch.zeros(2, 5, 8, 9)}, "`input`"),
    "channels for the groups": ({"groups": 2}, "`input`"),
    "kernels for the groups": ({"groups": 4, "weight": torch.zeros(6, 1, 3, 3)}, "`weight`"),
    "groups 0": ({"groups": 0}, "`groups`"),
    "positions of another kernel size": ({"positions": torch.zeros(4, 25, 2)}, "`positions`"),
    "positions for other channels": ({"positions": torch.zeros(6, 9, 2)}, "`positions`"),
    "positions with taps in two axes": ({"positions": torch.zeros(4, 3, 3, 2)}, "`positions`"),
    "positions with three coordinates": ({"positions": torch.zeros(4, 9, 3)}, "`positions`"),
    "positions per kernel of other kernels": ({"positions": torch.zeros(5, 4, 9, 2)}, "`positions`"),
    "positions per group of other groups": ({"positions": torch.zeros(2, 9, 2)}, "`positions`"),
    "bias": ({"bias": torch.zeros(4)}, "`bias`"),
    "padding beyond what positions can tell apart": ({"padding": 2**24}, "at most 16777216 pixels a side"),
    "input smaller than the kernel": ({"input": torch.zeros(1, 4, 2, 9)}, "`input`"),
    "dilated kernel larger than the input": ({"dilation": (1, 5)}, "`input`"),
    "backend": ({"backend": "cuda"}, "`backend`"),
    "padding string": ({"padding": "full"}, "`padding`"),
    "same with a stride": ({"padding": "same", "stride": 2}, "`padding`"),
    "negative padding": ({"padding": -1}, "`padding`"),
    "stride 0": ({"stride": 0}, "`stride`"),
    "three strides": ({"stride": (1, 1, 1)}, "`stride`"),
    "dilation 0": ({"dilation": (0, 1)}, "`dilation`"),
    "another device": ({"positions": torch.zeros(4, 9, 2, device="meta")}, "`positions`"),
}

BAD_TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "positions in float16": ({"positions": torch.zeros(4, 9, 2).half()}, "`positions`"),
    "positions in bfloat16": ({"positions": torch.zeros(4, 9, 2).bfloat16()}, "`positions`"),
    "integer positions": ({"positions": torch.zeros(4, 9, 2).long()}, "`positions`"),
    "integer input": ({"input": torch.zeros(2, 4, 8, 9).long()}, "`input`"),
    "weight of another dtype": ({"weight": torch.zeros(6, 4, 3, 3).double()}, "`weight`"),
    "bias of another dtype": ({"bias": torch.zeros(6).half()}, "`bias`"),
    "stride 1.5": ({"stride": 1.5}, "`stride`"),
    "no padding": ({"padding": None}, "`padding`"),
}


def test_the_good_call_is_good() -> None:
    assert icnn_zoo.irregular_conv2d(**GOOD).shape == (2, 6, 6, 7)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_wrong_value_is_a_value_error_that_names_the_argument(name: str, backend: str) -> None:
    change, argument = BAD_VALUES[name]
    with pytest.raises(ValueError, match=re.escape(argument)):
        icnn_zoo.irregular_conv2d(**{**GOOD, "backend": backend, **change})


@pytest.mark.parametrize("name", BAD_TYPES)
def test_a_wrong_type_is_a_type_error_that_names_the_argument(name: str) -> None:
    change, argument = BAD_TYPES[name]
    with pytest.raises(TypeError, match=re.escape(argument)):
        icnn_zoo.irregular_conv2d(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"positions": torch.zeros(4, 25, 2)}, ["[1, 9, 2]", "[4, 9, 2]", "[6, 4, 9, 2]", "[4, 25, 2]"]),
        ({"input": torch.zeros(2, 5, 8, 9)}, ["4", "5"]),
        ({"backend": "cuda"}, ["auto", "torch", "reference", "'cuda'"]),
        ({"padding": "full"}, ['"same"', '"valid"', "'full'"]),
        ({"positions": torch.zeros(4, 9, 2).half()}, ["float32", "torch.float16", ".float()"]),
    ],
    ids=["positions", "input", "backend", "padding", "half"],
)
def test_the_message_says_what_is_allowed_and_what_came(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        icnn_zoo.irregular_conv2d(**{**GOOD, **change})
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("padding", [1, (1, 1), [1, 1], "same"])
def test_equal_ways_to_say_the_same_padding(padding: Any) -> None:
    call = {**GOOD, "input": torch.randn(2, 4, 8, 9), "weight": torch.randn(6, 4, 3, 3)}
    assert torch.equal(icnn_zoo.irregular_conv2d(**call, padding=padding), icnn_zoo.irregular_conv2d(**call, padding=1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_positions_that_are_not_finite_are_an_error_while_anomalies_are_detected(value: float) -> None:
    positions = GOOD["positions"].clone()
    positions[1, 2, 0] = value
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(ValueError, match=rf"finite; got {value} at \[1, 2, 0\]"),
    ):
        icnn_zoo.irregular_conv2d(**GOOD | {"positions": positions})
