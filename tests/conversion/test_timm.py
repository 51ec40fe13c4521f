"""timm architectures, whole: converting keeps their function, their positions matter, and they deploy."""

import datetime
import json
from pathlib import Path

import pytest
import timm
import timm_check
import torch

from icnn_zoo.nn import conv_rules

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "timm_sweep.json"

# Each for something that no smaller one has: a class of convolutions, a geometry, a wrapper, or an order.
SMALL = ("test_efficientnet_gn", "test_nfnet", "test_mambaout", "test_convnext3", "tf_mixnet_s", "coat_tiny")
HARD = [
    "tf_mixnet_s", "nf_ecaresnet26", "cpubone_nano", "fastvit_sa12", "pvt_v2_b0", "csatv2", "resnetv2_50x1_bit",
    "efficientnet_x_b3", "vit_small_r26_s32_224", "bat_resnext26ts", "ghostnetv2_100", "ghostnetv3_100",
    "inception_v3", "lamhalobotnet50ts_256", "lowformer_b0", "coat_tiny", "crossvit_9_240", "inception_next_atto",
    "mvitv2_tiny", "test_coatnet", "edgenext_small_rw", "skresnet18", "dm_nfnet_f0", "convmixer_1024_20_ks9_p14",
    "mobilenetv4_conv_blur_medium", "mobilenetv4_hybrid_medium_075", "test_mambaout", "test_convnext3",
    "ese_vovnet19b_slim_dw", "fasternet_t0", "cs3darknet_focus_s", "lcnetv2_small", "efficientvit_b0", "hgnetv2_b0",
    "iformer_t", "poolformer_s12", "repghostnet_050", "repvit_m0_9", "legacy_xception", "pit_ti_224",
    "xcit_nano_12_p8_224", "tresnet_m", "tnt_s_legacy_patch16_224", "resnest14d", "regnetx_002", "efficientvim_m1",
    "dpn48b", "tiny_vit_5m_224", "repvgg_a0", "mobileone_s1", "efficientnet_cc_b0_4e", "hrnet_w18_small",
    "res2net50_48w_2s", "densenet121", "davit_tiny", "twins_svt_small", "test_vit", "focalnet_tiny_srf",
    "gcvit_xxtiny", "levit_128s", "vgg11", "resnet26d", "nasnetalarge",
]  # fmt: skip
DILATED = [
    "convnext_atto", "inception_next_atto", "skresnet18", "tf_efficientnet_b0", "dm_nfnet_f0", "resnetv2_50x1_bit",
    "cs3darknet_focus_s", "regnetx_002", "xception41", "repvgg_a0",
]  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_small_architectures_keep_their_function_learn_and_deploy(name):
    timm_check.check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", HARD)
def test_hard_architectures_keep_their_function_learn_and_deploy(name):
    timm_check.check(name)


@pytest.mark.slow
@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", DILATED)
def test_dilated_feature_extractors_keep_their_function_learn_and_deploy(name, output_stride):
    found = timm_check.check(name, features_only=True, output_stride=output_stride)
    assert found["image"] == [97, 131]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(8))
def test_a_sample_that_changes_every_day_keeps_its_function_learns_and_deploys(number):
    passed = [name for name, row in _results().items() if row["status"] == "passed" and row["seconds"] < 30]
    name = passed[(8 * datetime.date.today().toordinal() + number) * 7919 % len(passed)]
    print(name)
    timm_check.check(name)


def test_the_sweep_has_a_row_for_every_architecture_and_a_reason_for_every_one_that_did_not_pass():
    results = _results()
    unexplained = [name for name in timm_check.timm_names() if name not in results]
    assert not unexplained or timm.__version__ not in RESULTS.read_text()
    assert not [name for name, row in results.items() if row["status"] == "failed"]
    assert all(row["reason"] for row in results.values() if row["status"] == "skipped")
    assert not [name for name, row in results.items() if row["refused"]]


def test_the_check_notices_a_standardisation_that_is_lost(monkeypatch):
    readers = conv_rules._READERS
    monkeypatch.setitem(readers, "timm.layers.std_conv.ScaledStdConv2d", readers[torch.nn.Conv2d])
    with pytest.raises(AssertionError, match="converted at epsilon 0, in eval mode, the output is off"):
        timm_check.check("test_nfnet")


def _results():
    return json.loads(RESULTS.read_text())["architectures"]
