"""What README, guides and docstrings show: Python runs as it stands, commands parse, links lead somewhere."""

import argparse
import doctest
import importlib
import json
import re
import runpy
import shlex
import shutil
import statistics
import subprocess
import sys
import tomllib
import warnings
from functools import partial
from pathlib import Path

import pytest
from miniature import write_folder
from zoo_cases import ABOUT, NAME

from icnn_zoo.cli.programs import COMMANDS, lightning_main, zoo_main
from icnn_zoo.publishing.about import read_about
from icnn_zoo.publishing.publisher import publish
from icnn_zoo.training.lightning_cli import ZooCLI

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path.stem: path.read_text(encoding="utf-8") for path in PAGES}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PROGRAMS = "(?:icnn-zoo|lightning|python|pip)"
HEREDOC = re.compile(r"^cat > (?P<file>\S+) <<(?P<end>\w+)\n(?P<text>.*?)^(?P=end)\n", re.DOTALL | re.MULTILINE)
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "icnn_zoo").rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


def blocks(language):
    """Every code block of a language: page, place on the page, text."""
    found = []
    for page, text in TEXT.items():
        for number, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE), 1):
            found.append(pytest.param(block, id=f"{page}-{number}"))
    return found


def command_lines():
    """Every command line of the bash blocks, of the text between them, and of the configs' comments."""
    for parameter in blocks("bash"):
        text = HEREDOC.sub("", parameter.values[0])
        yield from text.replace("\\\n", " ").splitlines()
    for text in TEXT.values():
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        yield from re.findall(rf"`({PROGRAMS} [^`\s]+ [^`\n]+)`", prose)
    for path in CONFIGS:
        yield from re.findall(rf"^# +({PROGRAMS} .*)$", path.read_text(encoding="utf-8"), re.MULTILINE)


def commands():
    """The command lines, each once, without what the shell does with them."""
    found = {}
    for line in command_lines():
        for part in line.split("&&"):
            words = [word for word in shlex.split(part, comments=True) if word != "..."]
            if ">" in words:
                words = words[: words.index(">")]
            if words:
                found[" ".join(words)] = words
    return [pytest.param(words, id=line[:80]) for line, words in found.items()]


class Parsed(Exception):
    """A command line was understood; what it asks for is not done here."""


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name, monkeypatch):
    monkeypatch.setattr("icnn_zoo.ops.backends._registered", {})
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run_as_they_stand(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("icnn_zoo.ops.backends._registered", {})
    monkeypatch.setattr(
        "icnn_zoo.nn.conv_rules._READERS", dict(importlib.import_module("icnn_zoo.nn.conv_rules")._READERS)
    )
    exec(block, {"__name__": "block"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_blocks_train(block, tmp_path, monkeypatch):
    """As parts of a config, for a step on small scenes, or on small files where they are about data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "part.yaml").write_text(block)
    own = "data:" in block
    if own:
        write_folder(tmp_path / "data")
    base = ROOT / "configs" / "folder.yaml" if own else ROOT / "tests" / "shapes.yaml"
    small = (
        "--trainer.accelerator cpu --trainer.max_steps 1 --trainer.val_check_interval 1 --trainer.limit_val_batches 1"
    )
    small += " --trainer.enable_progress_bar false --pictures.num_samples 0"
    small += " --data.init_args.num_workers 0 --data.init_args.batch_size 2 --data.init_args.crop_size 65"
    files = " --data.init_args.root data --model.backbone test_resnet --model.start layer3 --model.pretrained false"
    small += files if own else " --data.init_args.num_train 4 --data.init_args.num_val 2"
    lightning_main(["fit", "-c", str(base), "-c", "part.yaml", *small.split()])
    assert list((tmp_path / "runs").rglob("last.ckpt"))


def test_files_that_bash_blocks_write_are_what_publish_reads(tmp_path):
    found = [match for parameter in blocks("bash") for match in HEREDOC.finditer(parameter.values[0])]
    assert [match["file"] for match in found] == ["about.yaml"]
    (tmp_path / "about.yaml").write_text(found[0]["text"])
    about, _ = read_about(tmp_path / "about.yaml")
    assert about.metrics[0].value is None


@pytest.mark.parametrize("words", [parameter for parameter in commands() if "plan" in parameter.values[0][1:2]])
def test_plans_run(words, capsys):
    """The commands that take no data and no time."""
    zoo_main(words[1:])
    assert "0 refused" in capsys.readouterr().out


def test_list_runs(zoo_run, tmp_path, capsys):
    publish(zoo_run, NAME, tmp_path / "zoo", ABOUT)
    zoo_main(["list", "--registry", str(tmp_path / "zoo")])
    assert NAME in capsys.readouterr().out.splitlines()[-1]


def test_extras_to_install_exist():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    extras = {extra for text in TEXT.values() for extra in re.findall(r'pip install [^`\n]*?"\.\[([\w-]+)\]"', text)}
    assert len(extras) >= 4
    assert extras <= known.keys()


@pytest.mark.parametrize("words", commands())
def test_commands_parse(words, tmp_path, monkeypatch):
    """By the program's own parser, stopped before it does anything."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "configs" / "quickstart.yaml", tmp_path / "config.yaml")
    for name in ("folder", "quickstart"):
        run = tmp_path / "runs" / name / "version_0"
        run.mkdir(parents=True)
        shutil.copy(ROOT / "configs" / f"{name}.yaml", run / "config.yaml")
    if words[0] in ("srun", "torchrun"):
        start = words.index("icnn_zoo.cli" if words[0] == "torchrun" else "icnn-zoo")
        words = ["icnn-zoo", *words[start + 1 :]]
    if words[0] in ("lightning", "icnn-zoo"):
        own = words[0] == "icnn-zoo" and words[1] in COMMANDS
        parse_own(words, monkeypatch) if own else parse_lightning(words, monkeypatch)
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        parse_own(words, monkeypatch)
    elif words[:2] == ["python", "-m"]:
        monkeypatch.syspath_prepend(ROOT)
        parse_own(words, monkeypatch)
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file(), words
    else:
        assert words[0] in ("python3", "pip", ".", "pytest", "mkdocs"), words


def parse_own(words, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def stop(*arguments, **options):
        raise Parsed(parse(*arguments, **options))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", words[1:])
    if words[0] == "icnn-zoo":
        run = partial(zoo_main, words[1:])
    elif words[1] == "-m":
        monkeypatch.setattr(sys, "argv", words[2:])
        run = partial(runpy.run_module, words[2], run_name="__main__")
    else:
        run = partial(runpy.run_path, str(ROOT / words[1]), run_name="__main__")
    with pytest.raises(Parsed):
        run()


def parse_lightning(words, monkeypatch):
    def stop(self):
        raise Parsed

    monkeypatch.setattr(ZooCLI, "instantiate_classes", stop)
    monkeypatch.setattr(ZooCLI, "before_instantiate_classes", lambda self: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((Parsed, SystemExit)) as stopped:
            ZooCLI.run(words[1:])
    helped = any(word.endswith("help") for word in words)
    assert (stopped.value.code == 0) if helped else stopped.type is Parsed


def test_links_lead_to_files_and_headings():
    for path in [*PAGES, *ROOT.glob("*.md"), *RESULTS.glob("*.md")]:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
            if target.startswith(("http://", "https://")):
                assert re.fullmatch(r"https?://[\w.-]+\.[a-z]{2,}(/[\w./%#?=&~-]*)?", target), (path.name, target)
                continue
            file, _, heading = target.partition("#")
            linked = path.parent / file if file else path
            assert linked.exists(), (path.name, target)
            if heading:
                headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", text.lower()).strip().replace(" ", "-") for text in headings}
                assert heading in slugs, (path.name, target)


def test_the_site_builds_without_a_warning(tmp_path):
    """Strictly: links, anchors and names of the API reference that lead nowhere are errors."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    api = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    for name in importlib.import_module("icnn_zoo").__all__:
        if name != "__version__":
            assert f'id="icnn_zoo.{name}"' in api, name


@pytest.mark.parametrize("file", ["cpu_2cores.json", "cpu_2cores_avx2.json"])
def test_speeds_stand_in_the_committed_results(file):
    """Every ratio of this package's column, and that of the whole training steps."""
    text = TEXT["README"] + TEXT["speed"] + TEXT["reproduce"]
    results = json.loads((RESULTS / file).read_text())
    assert len(results["shapes"]) == 14
    for shape in results["shapes"]:
        ratios = [statistics.median(record["ratios"]) for record in shape["records"] if record["peer"] == "icnn_zoo"]
        assert f"| {ratios[0]:.2f} / {ratios[1]:.2f} |" in text, shape["name"]
    regular, irregular = results["training_step"]["seconds_per_step"].values()
    ratio = statistics.median(ours / base for ours, base in zip(irregular, regular, strict=True))
    assert re.search(rf"{ratio:.2f} times the\s+regular one's", text)
