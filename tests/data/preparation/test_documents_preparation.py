"""Preparing documents: splits without common authors, the same files from the same PDFs, and bad input by name."""

import json
import os
import signal
import subprocess

import numpy as np
import pytest
from pdf_cases import article, write_library, write_pdf

from icnn_zoo.cli.programs import zoo_main
from icnn_zoo.data.documents import read_pages
from icnn_zoo.data.label_files import read_labels
from icnn_zoo.data.preparation import document_sources as sources
from icnn_zoo.data.preparation import documents as preparation
from icnn_zoo.data.preparation.document_sources import Document, Source, split_documents
from icnn_zoo.data.preparation.documents import prepare_documents


def files(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def killed(folder, split, document):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def library(tmp_path):
    return write_library(tmp_path / "pdfs")


def test_a_folder_becomes_a_dataset(library, tmp_path, capsys):
    zoo_main(["prepare", "documents", "--pdfs", str(library), "--root", str(tmp_path / "data")])
    assert "of 12 documents" in capsys.readouterr().out
    folder = tmp_path / "data" / "documents"
    pages = read_pages(folder)
    assert sum(len(entries) for entries in pages.values()) == 24
    assert min(len(entries) for entries in pages.values()) >= 2
    for split, entries in pages.items():
        for page in entries:
            labels = read_labels(folder / "labels" / split / f"{page.name}.png")
            assert labels.shape == (800, 600)
            assert set(np.unique(labels)) == {0, 1, 2, 3, 4, 8}


def test_the_same_pdfs_give_the_same_files(library, tmp_path):
    for name in ("one", "two"):
        prepare_documents(tmp_path / name, pdfs=library)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_an_interrupted_call_goes_on_and_ends_as_one_that_was_not(library, tmp_path, monkeypatch):
    prepare_documents(tmp_path / "whole", pdfs=library)
    label, calls = preparation.label_document, []

    def stop(document):
        calls.append(document.name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return label(document)

    monkeypatch.setattr(preparation, "label_document", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_documents(tmp_path / "parts", pdfs=library)
    folder = tmp_path / "parts" / "documents"
    assert not (folder / "manifest.json").exists()
    with (folder / "progress.jsonl").open("a") as log:
        log.write('{"document": "cut o')  # as by a kill
    prepare_documents(tmp_path / "parts", pdfs=library)
    assert len(calls) == 13  # of 12 documents one was begun twice
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_more_pages_add_to_those_that_are_there(library, tmp_path):
    prepare_documents(tmp_path / "grown", pdfs=library, pages=15)
    folder = tmp_path / "grown" / "documents"
    few = read_pages(folder)
    prepare_documents(tmp_path / "grown", pdfs=library, pages=100)
    many = read_pages(folder)
    assert few["test"] == many["test"]
    assert few["val"] == many["val"]
    assert many["train"][: len(few["train"])] == few["train"]
    assert len(many["train"]) > len(few["train"])


def test_several_workers_write_what_one_writes(library, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_PAGES_A_WORKER", 1)
    write_pdf(library / "package3" / "bare.pdf", [article(3), ""])  # a page is skipped: more documents are needed
    for name, workers in (("one", 1), ("several", 3)):
        prepare_documents(tmp_path / name, pdfs=library, pages=17, workers=workers)
    assert files(tmp_path / "one") == files(tmp_path / "several")


def test_a_worker_that_is_killed_leaves_what_was_done(library, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_PAGES_A_WORKER", 1)
    prepare_documents(tmp_path / "whole", pdfs=library)
    with monkeypatch.context() as patched:
        patched.setattr(preparation, "_write_pages", killed)
        with pytest.raises(RuntimeError, match=r"was killed.*go on with fewer `workers` than 2"):
            prepare_documents(tmp_path / "parts", pdfs=library, workers=2)
    assert not (tmp_path / "parts" / "documents" / "manifest.json").exists()
    prepare_documents(tmp_path / "parts", pdfs=library, workers=2)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_no_workers_are_refused_before_anything_is_written(library, tmp_path):
    with pytest.raises(ValueError, match="`workers` must be at least 1; got 0"):
        prepare_documents(tmp_path / "data", pdfs=library, workers=0)
    assert not (tmp_path / "data").exists()


def test_fewer_pages_than_evaluation_needs_are_refused(library, tmp_path):
    with pytest.raises(ValueError, match=r"`pages` must be more than the \d that testing and validation get; got 2"):
        prepare_documents(tmp_path, pdfs=library, pages=2)


def test_splits_share_no_package_and_no_author():
    rng = np.random.default_rng(0)
    documents = [
        Document(
            Source(None, f"package{rng.integers(150)}", str(number)),
            f"document{number}",
            tuple(range(rng.integers(1, 12))),
            frozenset(f"author{author}" for author in rng.integers(400, size=rng.integers(3))),
        )
        for number in range(400)
    ]
    splits = split_documents(sources._grouped(documents), test_pages=150, val_pages=60)
    assert sorted(entry.name for entries in splits.values() for entry in entries) == sorted(d.name for d in documents)
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        for key in (lambda entry: {entry.source.package}, lambda entry: entry.authors):
            names = [set().union(*map(key, splits[split])) for split in (one, other)]
            assert not names[0] & names[1]
    pages = {split: sum(len(entry.pages) for entry in entries) for split, entries in splits.items()}
    assert 150 <= pages["test"] < 220
    assert 60 <= pages["val"] < 110


def test_a_shared_address_joins_packages(tmp_path):
    for package in range(4):
        address = "someone@some.org" if package < 2 else f"writer{package}@some.org"
        write_pdf(tmp_path / str(package) / "a.pdf", [article(package).replace("A running header", address)])
    documents, _ = sources.read_documents(sources.folder_sources(tmp_path))
    groups = [entry.group for entry in sorted(documents, key=lambda entry: entry.source.package)]
    assert groups[0] == groups[1]
    assert len(set(groups)) == 3


def encrypted(path):
    return write_pdf(
        path, [article()], trailer=f"/Encrypt << /Filter /Standard /V 1 /R 2 /O <{'41' * 32}> /U <{'42' * 32}> /P -4 >>"
    )


def test_unusable_pdfs_are_skipped_by_name_with_a_count(library, tmp_path, capsys):
    encrypted(library / "package0" / "secret.pdf")
    (library / "package0" / "noise.pdf").write_bytes(b"%PDF-1.4\n" + bytes(range(256)))
    (library / "package0" / "empty.pdf").write_bytes(b"")
    write_pdf(library / "package0" / "none.pdf", [])
    write_pdf(library / "package1" / "poster.pdf", [article()], size=(3000, 4000))
    (library / "package1" / "copy.pdf").write_bytes((library / "package1" / "manual.pdf").read_bytes())
    zoo_main(["prepare", "documents", "--pdfs", str(library), "--root", str(tmp_path / "data")])
    report = capsys.readouterr().out
    skipped = (tmp_path / "data" / "documents" / "skipped.tsv").read_text()
    for name, reason in (
        ("package0/secret.pdf", "is encrypted"),
        ("package0/noise.pdf", "is broken or without pages"),
        ("package0/empty.pdf", "is broken or without pages"),
        ("package0/none.pdf", "is broken or without pages"),
        ("package1/poster.pdf", "the page is 1.4 m long"),
        ("package1/manual.pdf", "the same as package1/copy.pdf"),
    ):
        assert any(line.startswith(name) and reason in line for line in skipped.splitlines()), skipped
    assert "3 x is broken" in report
    assert "1 x is encrypted" in report
    assert "of 12 documents" in report


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "there is no folder"),
        (lambda folder: folder.mkdir(), "there are no PDFs in"),
        (lambda folder: encrypted(folder / "a" / "secret.pdf"), "none of 1 PDFs can be used:\n  1 x is encrypted"),
        (lambda folder: write_library(folder, packages=2), "of 2 packages and authors, and a split needs 3"),
    ],
)
def test_a_folder_that_gives_no_dataset_leaves_none(make, message, tmp_path):
    make(tmp_path / "pdfs")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare_documents(tmp_path / "data", pdfs=tmp_path / "pdfs")
    assert not [path for path in tmp_path.glob("data/**/*") if path.is_file() and path.name != ".lock"]


def test_other_pdfs_than_it_was_begun_with_are_refused(library, tmp_path):
    prepare_documents(tmp_path / "data", pdfs=library)
    write_pdf(library / "package0" / "new.pdf", [article()])
    with pytest.raises(ValueError, match="begun by another version or from other PDFs"):
        prepare_documents(tmp_path / "data", pdfs=library)


def test_without_apt_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"apt-get and dpkg-deb of Debian or Ubuntu .* --pdfs FOLDER"):
        prepare_documents(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_without_a_network_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.shutil, "which", lambda name: f"/usr/bin/{name}")
    failed = subprocess.CompletedProcess([], 100, stdout="", stderr="E: Temporary failure resolving")
    monkeypatch.setattr(sources.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"Temporary failure resolving\. Without a network"):
        prepare_documents(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_debian_package_gives_its_pdfs_and_its_license(tmp_path, monkeypatch):
    calls = []

    def run(command, cwd, **kwargs):
        calls.append(command[1])
        if command[1] == "download":
            (cwd / f"{command[2]}_1.0-2_all.deb").write_bytes(b"")
        else:
            docs = cwd / "content" / "usr" / "share" / "doc"
            write_pdf(docs / "texlive-doc" / "latex" / "fine" / "fine.pdf", [article()])
            (docs / "texlive-x-doc").mkdir()
            (docs / "texlive-x-doc" / "copyright").write_text("free")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sources.shutil, "which", lambda name: name)
    monkeypatch.setattr(sources.subprocess, "run", run)
    for _ in range(2):  # the second call fetches nothing
        (source,) = sources.debian_sources(tmp_path, ["texlive-x-doc"])
    assert calls == ["download", "-x"]
    assert (source.package, source.key) == ("fine", "texlive-x-doc/latex/fine/fine.pdf")
    assert (tmp_path / "licenses" / "texlive-x-doc_1.0-2.copyright").read_text() == "free"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["licenses", "texlive-x-doc"]


def test_two_processes_do_not_share_a_folder(library, tmp_path):
    import filelock

    (tmp_path / "documents").mkdir()
    with filelock.FileLock(tmp_path / "documents" / ".lock"), pytest.raises(RuntimeError, match="another process"):
        prepare_documents(tmp_path, pdfs=library)


def test_options_of_other_datasets_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="--pdfs does not apply to drawn-voc, only to documents"):
        zoo_main(["prepare", "drawn-voc", "--root", str(tmp_path), "--pdfs", "x"])


def test_the_manifest_counts_pages_documents_and_groups(library, tmp_path):
    prepare_documents(tmp_path, pdfs=library)
    manifest = json.loads((tmp_path / "documents" / "manifest.json").read_text())
    assert sum(manifest["pages"].values()) == 24
    assert sum(manifest["documents"].values()) == 12
    assert sum(manifest["groups"].values()) == 6
