"""Publishing into hf://, s3:// and what else fsspec writes to: the index last, killed pushes resumed, refusals by name.

Hugging Face is played by a hub of the tests on the loopback, s3 by moto's server; the other cases run on fsspec's own
memory file system.
"""

import json
import re
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub import HfApi, HfFileSystem, ModelCard, constants
from loopback_hub import WRITER, Hub
from zoo_cases import ABOUT, NAME

import icnn_zoo
from icnn_zoo.cli.programs import lightning_main, zoo_main
from icnn_zoo.publishing import publisher, targets
from icnn_zoo.publishing.publisher import publish
from icnn_zoo.publishing.pushing import mark_checkpoint, push
from icnn_zoo.publishing.targets import open_target
from icnn_zoo.training.network_sources import find_source
from icnn_zoo.zoo.indices import Mark
from icnn_zoo.zoo.networks import verify_checkpoint

# Lightning's own warnings on short CPU runs say nothing about the package, nor do clients' of things to come.
pytestmark = pytest.mark.filterwarnings("ignore")
MEASURED = {**ABOUT, "metrics": [{"name": "val/mIoU", "protocol": "none", "value": 0.5}]}
PARTS = {f"{NAME}/model.safetensors", f"{NAME}/card.json", f"{NAME}/README.md", "README.md", "index.json"}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ICNN_ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ICNN_ZOO_REGISTRY", raising=False)


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@pytest.fixture
def hub(monkeypatch):
    with Hub() as running:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, running.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        HfFileSystem.clear_instance_cache()
        yield running
    HfFileSystem.clear_instance_cache()


@pytest.fixture
def bucket(monkeypatch):
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://{}:{}".format(*server.get_host_and_port()))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    system.mkdir("bucket")
    type(system).clear_instance_cache()
    yield system
    type(system).clear_instance_cache()
    server.stop()


def held(memory) -> set[str]:
    return {path.removeprefix("/zoo/") for path in memory.store}


def test_a_run_is_published_on_the_hub_and_loaded_by_its_address(hub, zoo_run, capsys):
    publish(zoo_run, NAME, "hf://user/zoo", MEASURED)
    assert hub.files("user/zoo").keys() == PARTS | {".gitattributes"}
    assert hub.messages == [f"Publish {NAME}"]  # all of it in one commit
    assert verify_checkpoint(f"hf://user/zoo/{NAME}") < 1e-6
    pin = find_source(f"hf://user/zoo/{NAME}").published[1].pin
    assert icnn_zoo.load_checkpoint(f"hf://user/zoo/{pin}", progress=False).card.name == NAME
    assert icnn_zoo.list_checkpoints(registry="hf://user/zoo") == [NAME]
    zoo_main(["mark", NAME, "--to", "hf://user/zoo", "--superseded", "A better one is coming."])
    zoo_main(["show", f"hf://user/zoo/{NAME}"])
    assert "> **Superseded**: A better one is coming." in capsys.readouterr().out
    with pytest.warns(UserWarning, match=r"hf://user/zoo is superseded: A better one"):
        icnn_zoo.load_checkpoint(f"hf://user/zoo/{NAME}", progress=False)


def test_training_starts_from_a_checkpoint_on_the_hub(hub, zoo_run, tmp_path, caplog):
    publish(zoo_run, NAME, "hf://user/zoo", MEASURED)
    small = "--trainer.accelerator cpu --trainer.max_steps 1 --trainer.limit_val_batches 0 --pictures.num_samples 0"
    small += " --data.init_args.num_workers 0 --data.init_args.batch_size 2 --trainer.enable_progress_bar false"
    small += f" --model.lr 0 --model.position_lr 0 --trainer.logger.init_args.save_dir {tmp_path}"
    start = ["--model.pretrained", f"hf://user/zoo/{NAME}"]
    with caplog.at_level("INFO"):
        lightning_main(["fit", "-c", str(Path(__file__).parents[1] / "shapes.yaml"), *small.split(), *start])
    assert f"hf://user/zoo/{NAME}" in caplog.text
    assert "of them 4 displacements; the head is loaded), 0 missing, 0 unused" in caplog.text
    published = icnn_zoo.load_checkpoint(f"hf://user/zoo/{NAME}", progress=False).state_dict()
    trained = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)["state_dict"]
    for name in ("backbone.layer4.0.conv1.weight", "backbone.layer4.0.conv1.displacement", "classifier.weight"):
        assert torch.equal(trained[f"model.{name}"], published[name]), name


def test_on_the_hub_what_was_sent_is_not_sent_again_and_a_change_in_between_is_refused(hub, zoo_run, zoo_folder):
    hub.refuse = "/commit/"
    with pytest.raises(RuntimeError, match=r"`to`: hf://user/zoo/sub cannot be written: .*503"):
        publish(zoo_run, NAME, "hf://user/zoo/sub", MEASURED)
    assert hub.files("user/zoo").keys() == {".gitattributes"}
    hub.refuse = "^$"
    publish(zoo_run, NAME, "hf://user/zoo/sub", MEASURED)
    assert len(hub.uploads) == 1
    assert f"sub/{NAME}/model.safetensors" in hub.files("user/zoo")
    target = open_target("hf://user/other")
    HfApi().create_repo("user/other")
    assert target.read("index.json") is None
    hub.commits["user/other"].append({"note": b"of somebody else"})
    with pytest.raises(RuntimeError, match=r"hf://user/other cannot be written: .*412"):
        push(zoo_folder, NAME, target)
    assert hub.files("user/other") == {"note": b"of somebody else"}


@pytest.mark.parametrize("made", [True, False])
def test_the_hub_refuses_who_may_not_write_before_anything_is_made(hub, zoo_run, monkeypatch, made):
    if made:
        hub.commits["user/zoo"] = [{}]
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    monkeypatch.setattr(publisher, "load_task", lambda *_: pytest.fail("work began"))
    with pytest.raises(RuntimeError, match=r"hf://user/zoo cannot be written: .* comes from HF_TOKEN") as error:
        publish(zoo_run, NAME, "hf://user/zoo", MEASURED)
    assert "hf_reader" not in str(error.value)
    assert hub.commits == ({"user/zoo": [{}]} if made else {})


def test_a_run_is_published_on_s3_marked_and_loaded_by_its_address(bucket, zoo_run, capsys):
    publish(zoo_run, NAME, "s3://bucket/zoo", MEASURED)
    assert {path.removeprefix("bucket/zoo/") for path in bucket.find("bucket")} == PARTS
    assert verify_checkpoint(f"s3://bucket/zoo/{NAME}") < 1e-6
    zoo_main(["mark", NAME, "--to", "s3://bucket/zoo", "--yanked", "Trained on the test split."])
    with pytest.raises(ValueError, match="is yanked: Trained on the test split"):
        icnn_zoo.load_checkpoint(f"s3://bucket/zoo/{NAME}")
    with pytest.raises(RuntimeError, match=r"s3://none/zoo cannot be written: .*AWS_ACCESS_KEY_ID"):
        publish(zoo_run, NAME, "s3://none/zoo", MEASURED)
    assert bucket.ls("") == ["bucket"]


class Killed(BaseException):
    """Stands for a kill: no handler of errors runs."""


@pytest.mark.parametrize("number", range(5))
def test_a_push_that_ends_before_any_file_leaves_a_registry_and_goes_on(memory, zoo_folder, monkeypatch, number):
    sent = []

    def recorded(original):
        def write(self, *arguments, **options):
            if len(sent) == number:
                raise Killed
            sent.append(arguments)
            return original(self, *arguments, **options)

        return write

    memory.pipe("/zoo/index.json", b'{"format": 1, "checkpoints": []}')
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", recorded(MemoryFileSystem.put_file))
        patch.setattr(targets.StoreTarget, "_commit", recorded(targets.StoreTarget._commit))
        with pytest.raises(Killed):
            push(zoo_folder, NAME, open_target("memory://zoo"))
    assert icnn_zoo.list_checkpoints(registry="memory://zoo") == []
    arrived = {path: file.modified for path, file in memory.store.items() if path != "/zoo/index.json"}
    assert len(arrived) == number
    for _ in range(2):  # the second is of somebody who did not see the end of the first
        push(zoo_folder, NAME, open_target("memory://zoo"))
        assert json.loads(memory.cat("/zoo/index.json"))["version"] == 1
    assert arrived.items() <= {path: file.modified for path, file in memory.store.items()}.items()
    assert held(memory) == PARTS
    assert verify_checkpoint(NAME, registry="memory://zoo") < 1e-6


def test_a_publish_that_was_cut_off_is_not_made_again(memory, zoo_run, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(publisher, "push", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            publish(zoo_run, NAME, "memory://zoo", MEASURED)
    with monkeypatch.context() as patch:
        patch.setattr(publisher, "load_task", lambda *_: pytest.fail("made again"))
        assert publish(zoo_run, NAME, "memory://zoo", MEASURED) == f"memory://zoo/{NAME}"
    assert held(memory) == PARTS
    assert not list((tmp_path / "cache" / "outgoing").iterdir())
    with pytest.raises(ValueError, match=f"{NAME} is published in 'memory://zoo' already"):
        publish(zoo_run, NAME, "memory://zoo", MEASURED)


def test_options_of_publishing_are_those_of_the_folder_it_is_made_in(memory, zoo_run, monkeypatch):
    given = []
    original = publisher.load_task
    monkeypatch.setattr(publisher, "load_task", lambda file, **options: given.append(options) or original(file))
    publish(zoo_run, NAME, "memory://zoo", MEASURED, half=True, allow=["some.Class"])
    assert given == [{"allow": ["some.Class"]}]
    card = json.loads(memory.cat(f"/zoo/{NAME}/card.json"))
    assert card["weights"]["size"] < 0.75 * 4 * card["weights"]["parameters"]


def test_a_file_that_arrives_otherwise_is_not_listed(memory, zoo_folder, monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda self, _, path: self.pipe_file(path, b"something else"))
    with pytest.raises(RuntimeError, match=r"memory://zoo cannot be written: .*model\.safetensors is not there as it"):
        push(zoo_folder, NAME, open_target("memory://zoo"))
    assert "index.json" not in held(memory)


@pytest.mark.parametrize(
    ("to", "kind", "message"),
    [
        ("https://example.org/zoo", ValueError, r"https://example\.org/zoo is a web server, which takes no files"),
        ("hf://user", ValueError, "must be hf://user/repo"),
        ("none://zoo", RuntimeError, "none://zoo cannot be written: ValueError: Protocol not known: none"),
        ("zip://zoo::/none.zip", RuntimeError, "zip://zoo::/none.zip cannot be written"),
        ("s3:/bucket/zoo", ValueError, "lost a slash"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_before_anything_is_made(zoo_run, monkeypatch, to, kind, message):
    monkeypatch.setattr(publisher, "load_task", lambda *_: pytest.fail("work began"))
    with pytest.raises(kind, match=message):
        publish(zoo_run, NAME, to, MEASURED)


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_marked_checkpoints_say_why_and_what_to_take(place, memory, zoo_run, zoo_folder, tmp_path, capsys):
    to = str(tmp_path / "zoo") if place == "folder" else "memory://zoo"
    for name in (NAME, "test_resnet.next"):
        publish(zoo_run, name, to, MEASURED)
    plain = open_target(to).read(f"{NAME}/README.md")
    mark_checkpoint(NAME, to, Mark(kind="superseded", reason="Trained longer.", successor="test_resnet.next"))
    with pytest.warns(UserWarning, match=r"is superseded: Trained longer\. \(take test_resnet\.next\)"):
        icnn_zoo.load_checkpoint(NAME, registry=to)
    page = open_target(to).read(f"{NAME}/README.md").decode()
    assert f"# {NAME}\n\n> **Superseded**: Trained longer. Take [test_resnet.next](../test_resnet.next/README" in page
    assert "superseded: Trained longer" in open_target(to).read("README.md").decode()
    mark_checkpoint(NAME, to, Mark(kind="yanked", reason="Wrong labels.", successor="test_resnet.next"))
    assert icnn_zoo.list_checkpoints(registry=to) == ["test_resnet.next"]
    with pytest.raises(
        ValueError, match=r"yanked: Wrong labels\..*take test_resnet\.next.*Its pin still loads it: "
    ) as error:
        icnn_zoo.load_checkpoint(NAME, registry=to)
    with pytest.warns(UserWarning, match="yanked: Wrong labels"):
        icnn_zoo.load_checkpoint(str(error.value).rpartition(" ")[2], registry=to)
    zoo_main(["list", "--registry", to])
    assert "[yanked: Wrong labels. (take test_resnet.next)]" in capsys.readouterr().out
    mark_checkpoint(NAME, to, None)
    assert open_target(to).read(f"{NAME}/README.md") == plain
    index = json.loads(open_target(to).read("index.json"))
    assert (index["format"], index["version"]) == (2, 5)  # what readers of before know, where nothing is marked
    assert all("mark" not in entry for entry in index["checkpoints"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test_resnet.shape", "--yanked", "why"], f"has no checkpoint test_resnet.shape; there are {NAME}"),
        ([NAME, "--yanked", "why", "--successor", "test_resnet.none"], "`successor`: .* has no checkpoint"),
        ([NAME, "--superseded", "why", "--successor", NAME], "cannot be its own"),
        ([NAME, "--clear", "--successor", NAME], "--clear takes the mark off"),
        ([NAME, "--yanked", "two\nlines"], "the mark is not valid: reason: String should match"),
        ([NAME, "--yanked", "turned \u202e"], r"has a control character, U\+202E"),
    ],
)
def test_a_wrong_mark_is_refused_and_changes_nothing(zoo_folder, arguments, message):
    before = (zoo_folder / "index.json").read_bytes()
    with pytest.raises(SystemExit, match=message):
        zoo_main(["mark", arguments[0], "--to", str(zoo_folder), *arguments[1:]])
    assert (zoo_folder / "index.json").read_bytes() == before


def test_readmes_have_the_metadata_that_hugging_face_renders(memory, zoo_run):
    about = {**MEASURED, "licence": "My own licence"}
    publish(zoo_run, NAME, "memory://zoo", MEASURED)
    publish(zoo_run, "test_resnet.own", "memory://zoo", about)
    own, other, both = (
        ModelCard(memory.cat(f"/zoo/{place}README.md").decode()).data for place in (f"{NAME}/", "test_resnet.own/", "")
    )
    for data in (own, other, both):
        assert (data.library_name, data.pipeline_tag) == ("icnn-zoo", "image-segmentation")
        assert data.metrics == ["mean_iou"]
        assert "test_resnet" in data.tags
    assert (own.license, other.license, other.license_name, both.license) == (
        "apache-2.0", "other", "my-own-licence", "other",
    )  # fmt: skip
    result = own.eval_results[0]
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("mean_iou", 0.5, "Shapes")
    assert own.model_name == NAME
    assert len(both.eval_results) == 2
    page = ModelCard(memory.cat("/zoo/README.md").decode())
    assert re.search(rf"\[{re.escape(NAME)}\]\({re.escape(NAME)}/README\.md\) \| A network of the tests", page.text)


def test_a_readme_of_ones_own_stays(zoo_run, tmp_path):
    (tmp_path / "README.md").write_text("# My networks\n")
    publish(zoo_run, NAME, tmp_path, MEASURED)
    assert (tmp_path / "README.md").read_text() == "# My networks\n"


def test_an_address_has_its_registry_in_it(zoo_folder):
    assert icnn_zoo.load_checkpoint(f"file://{zoo_folder}/{NAME}").card.name == NAME
    with pytest.raises(ValueError, match="give no `registry`"):
        icnn_zoo.load_checkpoint(f"file://{zoo_folder}/{NAME}", registry="default")
    with pytest.raises(ValueError, match="is not a checkpoint of file://"):
        icnn_zoo.load_checkpoint(f"file://{zoo_folder}/test_resnet.none")
