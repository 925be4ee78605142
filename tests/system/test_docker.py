"""What docker/ says, run without Docker: linted, checked against schemas, and its very commands
executed in empty virtual environments; nginx in front of a stub and of the real model server.
"""

import base64
import http.client
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import mlflow
import PIL.Image as pillow
import pytest
import yaml
from mlflow.cli import server as mlflow_server
from mlflow.models.cli import commands as mlflow_models
from packaging.requirements import Requirement

from har.data.images import decode_rgb
from har.inference.classifier import CLASSIFIER_FOLDER, Classifier, load_classifier, save_classifier
from har.inference.runtimes import RUNTIMES
from har.models import backbones
from har.models.backbones import Backbone
from har.models.build import build_model
from har.serving.client import ask_server
from har.serving.package import SERVING_PACKAGES, log_classifier
from tests.fixtures import (
    CLASSES,
    PATH,
    answering,
    build_tiny,
    free_port,
    serving,
    tiny_recipe,
    write_images,
)

ROOT = Path(__file__).parents[2]


DOCKER = ROOT / "docker"


DOCKERFILES = ("Dockerfile", "Dockerfile.serve", "Dockerfile.track")


PLAIN = "compose.sqlite.yaml"


COMPOSE_FILES = ("compose.yaml", PLAIN)


PINNED_IMAGE = r"[a-z/]+:\d+\.\d+\.\d+-[a-z-]+"


# PostgreSQL and SeaweedFS number their releases with two.
PINNED_RELEASE = rf"{PINNED_IMAGE}|postgres:\d+\.\d+-bookworm|chrislusf/seaweedfs:\d+\.\d+"


NGINX = shutil.which("nginx", path=f"{PATH}{os.pathsep}/usr/sbin")


needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


def instructions(name: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions in order: ("RUN", "pip install ..."), continuations joined."""
    lines = [line for line in (DOCKER / name).read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (word, rest) for word, _, rest in (x.partition(" ") for x in joined.split("\n")) if word
    ]


def words(name: str, instruction: str) -> list[str]:
    """The JSON list of an instruction that stands in a Dockerfile once."""
    (rest,) = (rest for word, rest in instructions(name) if word == instruction)
    return json.loads(rest[rest.index("[") :])


def compose(file: str = "compose.yaml") -> dict[str, Any]:
    return yaml.safe_load((DOCKER / file).read_text())


def lock() -> dict[str, str]:
    """Name to version of every package in the images."""
    lines = (DOCKER / "requirements.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return dict(pairs)


def run(*command: str | Path, **where: Any) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=False, capture_output=True, text=True, **where)


def tool(name: str) -> str:
    """The path of a linter that the extra `dev` brings."""
    found = shutil.which(name, path=PATH)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name: str) -> None:
    done = run(tool("hadolint"), DOCKER / name)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", COMPOSE_FILES)
def test_compose_file_meets_the_specification(file: str) -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    done = run(tool("check-jsonschema"), *schema, DOCKER / file)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", DOCKERFILES)
def test_image_is_pinned_without_root_secrets_or_caches(name: str) -> None:
    steps = instructions(name)
    kinds = [kind for kind, _ in steps]
    assert kinds.count("FROM") == 1 and re.fullmatch(PINNED_IMAGE, dict(steps)["FROM"])
    assert kinds.count("HEALTHCHECK") == 1 and kinds.count("CMD") == 1
    # a number, so that a cluster can see that it is not root; nothing is built as that user
    user = kinds.index("USER")
    assert steps[user][1] == "1000" and "RUN" not in kinds[user:]
    installs = [rest for kind, rest in steps if kind == "RUN" and "install " in rest]
    for line in [line for line in installs if line.startswith("pip ")]:
        assert "--no-cache-dir" in line
        assert "--only-binary :all:" in line or "--no-deps" in line
    text = (DOCKER / name).read_text()
    assert not re.search(r"apt|curl|gcc|://(?!127\.0\.0\.1|HOST)|secret|password|token|key", text)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_only_what_is_copied_is_sent_to_the_builder(name: str) -> None:
    copied = {
        source
        for kind, rest in instructions(name)
        if kind == "COPY"
        for source in rest.split()[:-1]
    }
    lines = (DOCKER / f"{name}.dockerignore").read_text().splitlines()
    assert "*" in lines and {line[1:] for line in lines if line.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)


def test_packages_come_before_the_code() -> None:
    steps = instructions("Dockerfile")
    install = next(i for i, (_, rest) in enumerate(steps) if "--requirement" in rest)
    code = next(i for i, (kind, rest) in enumerate(steps) if kind == "COPY" and "har" in rest)
    assert install < code


def test_pinned_versions_are_those_pyproject_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned, extras = lock(), project["optional-dependencies"]
    needed_by_images = [extras[name] for name in ("cuda", "openvino", "postgres", "s3", "server")]
    for line in chain(project["dependencies"], *needed_by_images):
        needed = Requirement(line)
        if needed.name == "har":
            continue
        version = pinned.get(needed.name, "none")
        assert version != "none" and needed.specifier.contains(version), (
            f"{needed} is pinned to {version}: do what docker/requirements.txt says at its top"
        )
    assert any(name.startswith("nvidia-cudnn") for name in pinned)


def test_serving_image_installs_just_what_a_model_pins() -> None:
    (line,) = (rest for kind, rest in instructions("Dockerfile.serve") if rest.startswith("pip "))
    runtimes = [name for runtime in RUNTIMES.values() for name in runtime.packages]
    assert line.split("requirements.txt ")[1].split() == [*SERVING_PACKAGES, *runtimes]
    assert "--constraint requirements.txt" in line


def test_commands_are_ones_that_mlflow_knows() -> None:
    serve = words("Dockerfile.serve", "CMD")
    assert serve[:3] == ["mlflow", "models", "serve"]
    context = mlflow_models.commands["serve"].make_context("serve", serve[3:])
    assert context.params["model_uri"] == "models:/har@champion"
    assert (context.params["env_manager"], context.params["port"]) == ("local", 5001)
    for file in COMPOSE_FILES:
        track = compose(file)["services"]["mlflow"]["command"]
        assert track[:2] == ["mlflow", "server"]
        context = mlflow_server.make_context("server", track[2:])
        assert context.params["workers"] == "1" and context.params["serve_artifacts"]


SERVICES = {
    "compose.yaml": {"postgres", "objects", "mlflow", "accounts", "model-server", "proxy"},
    PLAIN: {"mlflow", "model-server", "proxy"},
}


@pytest.mark.parametrize("file", COMPOSE_FILES)
def test_compose_opens_nothing_to_other_machines(file: str) -> None:
    services = compose(file)["services"]
    assert set(services) == SERVICES[file]
    assert {name for name in services if "ports" in services[name]} == {"mlflow", "proxy"}
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert service["cap_drop"] == ["ALL"] and "restart" in service
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service and "network_mode" not in service
        assert "build" in service or re.fullmatch(PINNED_RELEASE, service["image"])
    assert all(service["user"].split(":")[0] != "0" for service in services.values())


WRITTEN = {
    ("compose.yaml", "postgres"): ["postgres:/var/lib/postgresql/data"],
    ("compose.yaml", "objects"): ["objects:/data"],
    (PLAIN, "mlflow"): ["mlflow:/mlflow"],
}


@pytest.mark.parametrize(
    ("file", "name"), [(f, name) for f in sorted(SERVICES) for name in sorted(SERVICES[f])]
)
def test_each_container_is_bounded(file: str, name: str) -> None:
    service = compose(file)["services"][name]
    assert service["read_only"] is True and service["pids_limit"] <= 512
    assert service["mem_limit"] == service["memswap_limit"] and service["cpus"]
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert all(re.search(r":size=\d+[mg]\b", each) for each in service["tmpfs"])
    written = [each.split(":")[0] for each in service["tmpfs"]]
    volumes = [each for each in service.get("volumes", []) if not each.endswith(":ro")]
    assert written == ["/tmp", *(["/var/run/postgresql"] if name == "postgres" else [])]
    assert volumes == WRITTEN.get((file, name), [])
    # the accounts are made once
    assert "healthcheck" in service or "build" in service
    assert service["restart"] == ("on-failure:5" if name == "accounts" else "unless-stopped")


@pytest.mark.parametrize("file", COMPOSE_FILES)
def test_the_proxy_and_the_tracking_server_share_no_network(file: str) -> None:
    services, networks = compose(file)["services"], compose(file)["networks"]
    joined = {name: set(service["networks"]) for name, service in services.items()}
    assert not joined["proxy"] & joined["mlflow"]
    assert all(joined["model-server"] & joined[name] for name in ("proxy", "mlflow"))
    # whoever runs code in the model server reaches no other machine
    assert all(networks[name]["internal"] for name in joined["model-server"])
    # only MLflow reaches the database and the files
    for name in {"postgres", "objects"} & set(services):
        (network,) = joined[name]
        assert networks[network]["internal"]
        assert {each for each in joined if network in joined[each]} == {name, "mlflow"}


def test_both_files_serve_a_model_in_the_same_way() -> None:
    ours, plain = (compose(file)["services"] for file in COMPOSE_FILES)
    assert ours["proxy"] == plain["proxy"]
    apart = ("environment", "depends_on")
    served, plainly = (
        {name: value for name, value in each["model-server"].items() if name not in apart}
        for each in (ours, plain)
    )
    assert served == plainly


def test_no_password_is_given(tmp_path: Path) -> None:
    """Each is required, and the command in the file makes them all, once."""
    text = (DOCKER / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+_PASSWORD):\?", text))
    for service in compose()["services"].values():
        for name, value in service["environment"].items() if "environment" in service else ():
            if re.search("PASSWORD|SECRET", name):
                assert re.fullmatch(r"\$\{\w+_PASSWORD:\?[\w ./]+\}", value), name
    (command,) = re.findall(r"^# +(\(umask .*\))$", text, re.MULTILINE)
    (tmp_path / "docker").mkdir()
    assert run("bash", "-c", command, cwd=tmp_path).returncode == 0
    file = tmp_path / "docker/.env"
    made = dict(line.split("=") for line in file.read_text().splitlines())
    assert set(made) == asked and len(asked) == 6
    assert len(set(made.values())) == 6 and all(len(each) == 48 for each in made.values())
    assert file.stat().st_mode & 0o777 == 0o600
    # it never replaces what a database has
    assert run("bash", "-c", command, cwd=tmp_path).returncode != 0
    assert "/docker/.env" in (ROOT / ".gitignore").read_text().splitlines()
    assert command in (ROOT / "docs/deploying.md").read_text()


def test_health_is_an_image_that_is_classified() -> None:
    image = re.compile(r'\{"inputs": \["(\S+)"\]\}')
    proxy, server = (
        " ".join(compose()["services"]["proxy"]["healthcheck"]["test"]),
        " ".join(words("Dockerfile.serve", "HEALTHCHECK")),
    )
    found = [image.search(text) for text in (proxy, server)]
    for match in found:
        assert match is not None
        assert decode_rgb(base64.b64decode(match[1])).shape == (1, 1, 3)
    assert all("/invocations" in text and "/ping" not in text for text in (proxy, server))


def test_parts_of_compose_fit_together() -> None:
    services = compose(PLAIN)["services"]
    tracking = services["model-server"]["environment"]["MLFLOW_TRACKING_URI"]
    hosts = next(w for w in services["mlflow"]["command"] if w.startswith("--allowed-hosts="))
    assert tracking.removeprefix("http://") in hosts
    assert services["mlflow"]["volumes"] == ["mlflow:/mlflow"]
    assert "mlflow" in compose(PLAIN)["volumes"]
    port = dict(instructions("Dockerfile.serve"))["EXPOSE"]
    assert f"default model-server:{port};" in (DOCKER / "nginx.conf").read_text()
    assert f":{port}/invocations" in words("Dockerfile.serve", "HEALTHCHECK")[-1]
    for service in (*services.values(), *compose()["services"].values()):
        if "build" in service:
            assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_docs_name_files_and_services_that_exist() -> None:
    lines = (ROOT / "docs" / "deploying.md").read_text().splitlines()
    commands = [each for each in lines if each.startswith("docker compose")]
    assert commands
    for line in commands:
        (file,) = re.findall(r"(?<= -f )docker/(\S+)", line)
        service = re.search(r"compose .*(?:up|restart)(?: --\S+)* ([a-z][a-z-]*)", line)
        assert service is None or service[1] in compose(file)["services"], line


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str

    @property
    def error_code(self) -> str:
        """Of an error in JSON; nothing else must leave the proxy."""
        assert self.headers["content-type"] == "application/json"
        assert "Traceback" not in self.text and "/site-packages/" not in self.text
        error = json.loads(self.text)
        assert set(error) == {"error_code", "message"}
        return error["error_code"]


def send(
    address: str,
    path: str = "/invocations",
    *,
    body: Any = None,
    content_type: str | None = "application/json",
    method: str = "",
    more: dict[str, str] | None = None,
    limit_s: float = 120,
) -> Answer:
    """A request as it is, without what urllib adds to one."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=limit_s)
    headers = {"Content-Type": content_type} if content_type else {}
    headers |= more or {}
    try:
        connection.request(method or ("POST" if body else "GET"), path, body, headers)
        answer = connection.getresponse()
        names = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, names, answer.read().decode())
    finally:
        connection.close()


class Stub(BaseHTTPRequestHandler):
    """Answers with the status that the body names; to 0 only when it is released."""

    protocol_version = "HTTP/1.1"
    arrived, released = threading.Event(), threading.Event()

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        status = int(data) if data.isdigit() else 200
        if status == 0:
            self.arrived.set()
            self.released.wait(60)
        body = (
            data if status in (0, 200) else b"Traceback (most recent call last): /site-packages/x"
        )
        # the proxy may have hung up
        with suppress(ConnectionError):
            self.answer(status or 200, body)

    def do_GET(self) -> None:
        self.answer(200, b"ok")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if status == 200 else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def stub() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    with answering(server):
        yield server.server_port


@contextmanager
def held_up() -> Iterator[None]:
    """The stub lets requests of 0 wait until the block ends."""
    Stub.arrived.clear()
    Stub.released.clear()
    try:
        yield
    finally:
        Stub.released.set()


@contextmanager
def proxy(upstream: int, log: Path | None = None, **changes: str) -> Iterator[str]:
    """The real nginx with docker/nginx.conf, as a user without rights, before a local port.

    `changes` are directives to set otherwise, so that a test need not wait a minute; with `log`,
    its log is copied there.
    """
    assert NGINX is not None
    port = free_port()
    # not tmp_path, which only its owner may enter
    with TemporaryDirectory() as name:
        folder = Path(name)
        conf = (DOCKER / "nginx.conf").read_text().replace("/tmp/", f"{folder}/")
        conf = conf.replace("listen 8080", f"listen 127.0.0.1:{port}")
        conf = conf.replace("model-server:5001", f"127.0.0.1:{upstream}")
        for directive, value in changes.items():
            conf, count = re.subn(rf"\b{directive} [^;]+;", f"{directive} {value};", conf)
            assert count, directive
        (folder / "nginx.conf").write_text(conf)
        (folder / "log").touch()
        nobody: dict[str, Any] = {}
        if os.geteuid() == 0:
            for path in (folder, *folder.iterdir()):
                os.chown(path, 65534, 65534)
            nobody = {"user": 65534, "group": 65534, "extra_groups": []}
        command = [NGINX, "-c", folder / "nginx.conf", "-g", "daemon off;"]
        with (folder / "log").open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, **nobody)
        try:
            wait_until_answers(f"127.0.0.1:{port}", process, folder / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=30)
            if log is not None:
                shutil.copy(folder / "log", log)


def wait_until_answers(address: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(150):
        assert process.poll() is None, log.read_text()
        try:
            send(address, "/nowhere")
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"no answer: {log.read_text()}")


@pytest.fixture(scope="module")
def before_stub(stub: int) -> Iterator[str]:
    with proxy(stub) as address:
        yield address


MEGABYTE = 1_000_000


REFUSED = {
    "no content type": ({"body": "{}", "content_type": None}, 415, "UNSUPPORTED_MEDIA_TYPE"),
    "CSV": ({"body": "image\nx\n", "content_type": "text/csv"}, 415, "UNSUPPORTED_MEDIA_TYPE"),
    "parquet": (
        {"body": "PAR1", "content_type": "application/vnd.apache.parquet"},
        415,
        "UNSUPPORTED_MEDIA_TYPE",
    ),
    "almost JSON": (
        {"body": "{}", "content_type": "application/jsonlines"},
        415,
        "UNSUPPORTED_MEDIA_TYPE",
    ),
    "40 MB": ({"body": b" " * 40 * MEGABYTE}, 413, "TOO_LARGE"),
    "40 MB in pieces": ({"body": [b" " * MEGABYTE] * 40}, 413, "TOO_LARGE"),
    "GET": ({}, 405, "METHOD_NOT_ALLOWED"),
    "PUT": ({"method": "PUT", "body": "{}"}, 405, "METHOD_NOT_ALLOWED"),
    "POST to /ping": ({"path": "/ping", "body": "{}"}, 405, "METHOD_NOT_ALLOWED"),
    "a body with GET": (
        {"path": "/ping", "method": "GET", "body": b" " * MEGABYTE},
        413,
        "TOO_LARGE",
    ),
    "the server's own pages": ({"path": "/docs"}, 404, "NOT_FOUND"),
    "an unknown path": ({"path": "/invocations/x"}, 404, "NOT_FOUND"),
    "its page of errors": ({"path": "/error"}, 404, "NOT_FOUND"),
    "a foreign host": ({"more": {"Host": "evil.example"}, "body": "{}"}, 421, "UNKNOWN_HOST"),
    "a host that ends like ours": (
        {"more": {"Host": "localhost.evil.example:8080"}, "path": "/ping"},
        421,
        "UNKNOWN_HOST",
    ),
    "an address of the network": (
        {"more": {"Host": "192.168.0.7"}, "path": "/ping"},
        421,
        "UNKNOWN_HOST",
    ),
    "a long body for a foreign host": (
        {"more": {"Host": "evil.example"}, "body": b" " * MEGABYTE},
        413,
        "TOO_LARGE",
    ),
    "a page of another origin": (
        {"more": {"Origin": "http://evil.example"}, "body": "{}"},
        403,
        "FORBIDDEN",
    ),
    "a page of no origin": ({"more": {"Origin": "null"}, "path": "/ping"}, 403, "FORBIDDEN"),
    "a page of this computer": (
        {"more": {"Origin": "http://localhost:3000"}, "body": "{}"},
        403,
        "FORBIDDEN",
    ),
    "a path that is none": ({"path": "/%zz"}, 400, "BAD_REQUEST"),
    "a long path": ({"path": "/" + "x" * 40_000}, 414, "ERROR"),
    "a long header": ({"path": "/ping", "content_type": "x" * 40_000}, 400, "BAD_REQUEST"),
}


@needs_nginx
@pytest.mark.parametrize("name", REFUSED)
def test_proxy_refuses_in_json(before_stub: str, name: str) -> None:
    request, status, error_code = REFUSED[name]
    answer = send(before_stub, **request)
    assert (answer.status, answer.error_code) == (status, error_code)
    assert answer.headers["server"] == "nginx"  # and no version
    expected = {"/invocations": "POST", "/ping": "GET"}.get(request.get("path", "/invocations"))
    assert answer.headers.get("allow") == (expected if status == 405 else None)


@needs_nginx
@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8"])
def test_proxy_lets_json_through_unchanged(before_stub: str, content_type: str) -> None:
    for body in ('{"é": 1}', json.dumps("x" * 34 * MEGABYTE)):
        answer = send(before_stub, body=body.encode(), content_type=content_type)
        assert (answer.status, answer.text) == (200, body)
    for path in ("/ping", "/health", "/version"):
        assert send(before_stub, path)[::2] == (200, "ok")


@needs_nginx
@pytest.mark.parametrize("status", [400, 404, 405, 415, 422, 500, 502, 503, 504])
def test_proxy_keeps_the_servers_error_to_itself(before_stub: str, status: int) -> None:
    answer = send(before_stub, body=str(status))
    assert answer.status == status and answer.error_code


@needs_nginx
def test_proxy_without_a_model_server_says_so() -> None:
    with proxy(free_port()) as address:
        answer = send(address, body="{}")
    assert (answer.status, answer.error_code) == (502, "UNAVAILABLE")


@needs_nginx
def test_proxy_ends_what_takes_too_long(stub: int) -> None:
    limits = {"proxy_read_timeout": "1s", "client_body_timeout": "1s"}
    with held_up(), proxy(stub, **limits) as address:
        answer = send(address, body="0")
        assert (answer.status, answer.error_code) == (504, "TIMEOUT")
        # a client that never sends its body: nginx hangs up
        slow = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
        slow.putrequest("POST", "/invocations")
        slow.putheader("Content-Type", "application/json")
        slow.putheader("Content-Length", "10")
        slow.endheaders()
        with pytest.raises(ConnectionResetError):
            slow.getresponse()


@needs_nginx
def test_proxy_limits_what_one_client_may_ask_at_once(stub: int) -> None:
    with proxy(stub, **{"limit_conn clients": "1"}) as address, ThreadPoolExecutor() as pool:
        with held_up():
            first = pool.submit(send, address, body="0")
            assert Stub.arrived.wait(30)
            second = send(address, body="{}")
        assert (second.status, second.error_code) == (429, "TOO_MANY_REQUESTS")
        assert first.result().status == 200


def open_slowly(address: str, sent: bytes) -> socket.socket:
    """A client that stops in the middle of its request."""
    host, port = address.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=30)
    client.sendall(sent)
    return client


HEAD = b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
# What a slow client sends before it stops, and how many of them come.
SLOW = {
    "no byte": (b"", 500),
    "half a header": (b"POST /invocations HT", 800),
    "a header without its end": (HEAD, 800),
    "a body of one byte": (HEAD + b"Content-Length: 30000000\r\n\r\n{", 50),
    "a chunk of one byte": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nfff\r\n{", 50),
    "most of a body": (HEAD + b"Content-Length: 900000\r\n\r\n{" + b" " * 890_000, 50),
}


@needs_nginx
@pytest.mark.parametrize("name", SLOW)
def test_slow_clients_take_no_slot(before_stub: str, name: str) -> None:
    sent, count = SLOW[name]
    with ExitStack() as clients:
        for _ in range(count):
            clients.enter_context(open_slowly(before_stub, sent))
        started = time.monotonic()
        answer = send(before_stub, body="{}")
        assert (answer.status, answer.text) == (200, "{}")
        assert time.monotonic() - started < 5


@needs_nginx
@pytest.mark.slow
def test_a_pause_ends_an_upload(stub: int) -> None:
    with proxy(stub, client_body_timeout="1s", client_header_timeout="1s") as address:
        for sent, _ in SLOW.values():
            with open_slowly(address, sent) as client, suppress(ConnectionResetError):
                assert client.recv(100) in (b"", b"HTTP/1.1 408 Request Time-out\r\n"[:100])


@needs_nginx
def test_an_address_has_a_number_of_uploads(stub: int) -> None:
    with proxy(stub, **{"limit_conn uploads": "3"}) as address, ExitStack() as clients:
        sent, _ = SLOW["a body of one byte"]
        for _ in range(3):
            clients.enter_context(open_slowly(address, sent))
        time.sleep(0.5)
        assert send(address, body="{}").error_code == "TOO_MANY_REQUESTS"


@needs_nginx
def test_a_client_that_leaves_keeps_its_slot(stub: int) -> None:
    """The model server cannot know that nobody waits any more."""
    with proxy(stub, **{"limit_conn clients": "1"}) as address:
        with held_up():
            with open_slowly(address, HEAD + b"Content-Length: 1\r\n\r\n0"):
                assert Stub.arrived.wait(30)
            time.sleep(0.5)
            assert send(address, body="{}").status == 429
        for _ in range(50):
            if send(address, body="{}").status == 200:
                return
            time.sleep(0.1)
        pytest.fail("the slot is never free again")


# Requests that could write much into a log: 70 kB of each.
LOUD: dict[str, bytes] = {
    "a long path": b"GET /" + b"\xff" * 3_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a long query": b"GET /ping?" + b"%00" * 1_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a path beyond the limit": b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
    "a long method": b"A" * 3_000 + b" / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "long headers": b"GET /ping HTTP/1.1\r\nHost: localhost\r\n"
    + b"".join(b"User-Agent: " + b"\x80" * 3_000 + b"\r\n" for _ in range(5))
    + b"\r\n",
    "a long host": b"GET /ping HTTP/1.1\r\nHost: " + b"\xe9" * 3_000 + b"\r\n\r\n",
    "lines without an end": b"\r\n" * 35_000 + b"GET\0\r\n\r\n",
    "a body": HEAD + b"Content-Length: 70000\r\n\r\n" + b"\xff" * 70_000,
}


@needs_nginx
@pytest.mark.parametrize("name", LOUD)
def test_a_request_writes_little_into_the_log(stub: int, name: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with proxy(stub, log) as address:
        for _ in range(10):
            with open_slowly(address, LOUD[name]) as client, suppress(ConnectionError):
                client.settimeout(10)
                client.recv(4096)
        assert send(address, "/ping").status == 200
    assert 0 < log.stat().st_size < 10 * 3_000


@dataclass(frozen=True, kw_only=True)
class Served:
    """A registered champion, and the same classifier in this process."""

    classifier: Classifier
    photos: list[bytes] = field(repr=False)

    def body(self) -> str:
        rows = [[base64.b64encode(data).decode()] for data in (*self.photos, b"junk")]
        return json.dumps({"dataframe_split": {"columns": ["image"], "data": rows}})

    def check(self, answer: Answer) -> None:
        """Equal to what this process computes."""
        assert answer.status == 200
        rows = json.loads(answer.text)["predictions"]
        expected = self.classifier.classify([*self.photos, b"junk"])
        assert [row["label"] for row in rows] == [row["label"] for row in expected]
        assert [row["error"] for row in rows] == [row["error"] for row in expected]
        assert [row["probability"] for row in rows[:-1]] == pytest.approx(
            [row["probability"] for row in expected[:-1]], rel=1e-5
        )


def register_champion(store: str, folder: Path) -> Served:
    """An untrained tiny classifier, logged as a trained one is."""
    images = write_images(folder / "images", per_class=2)
    recipe = tiny_recipe(resize="bicubic")
    with pytest.MonkeyPatch.context() as patch:
        tiny = Backbone(build_tiny, build_tiny)
        patch.setitem(backbones.BACKBONES, "efficientnet-lite0", tiny)
        save_classifier(folder / CLASSIFIER_FOLDER, build_model(recipe, 3), CLASSES, recipe)
    classifier = load_classifier(folder / CLASSIFIER_FOLDER)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store)
    with mlflow.start_run():
        model_id = log_classifier(folder / CLASSIFIER_FOLDER)
    version = mlflow.register_model(f"models:/{model_id}", "har").version
    mlflow.MlflowClient().set_registered_model_alias("har", "champion", version)
    mlflow.set_tracking_uri(before)
    photos = [path.read_bytes() for path in sorted((images / "train").iterdir())]
    return Served(classifier=classifier, photos=photos)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Served]]:
    """`mlflow models serve` as the image starts it, from this environment."""
    folder = tmp_path_factory.mktemp("stock")
    # artifacts lie beside the working folder of who logs them
    store = f"sqlite:///{folder}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        served = register_champion(store, folder)
    command = words("Dockerfile.serve", "CMD")
    home = folder / "home"
    home.mkdir()
    away = {"MLFLOW_TRACKING_URI": store, "PYTHONSAFEPATH": "1", "HOME": str(home)}
    with serving(command, free_port(), folder / "log", **away) as address:
        yield address, served
    # what attackers sent is not in the log
    assert (folder / "log").stat().st_size < 3_000_000


@pytest.fixture(scope="module")
def before_stock(stock: tuple[str, Served]) -> Iterator[str]:
    with proxy(int(stock[0].rpartition(":")[2])) as address:
        yield address


@pytest.mark.slow
@needs_nginx
def test_answers_are_equal_through_the_proxy(stock: tuple[str, Served], before_stock: str) -> None:
    address, served = stock
    for each in (address, before_stock):
        served.check(send(each, body=served.body()))
        assert send(each, "/version").text == mlflow.__version__
        assert send(each, "/health").status == send(each, "/ping").status == 200


@pytest.mark.slow
@needs_nginx
def test_the_client_gets_large_photos_through_the_proxy(before_stock: str) -> None:
    largest = encode(pillow.new("RGB", (2_880, 2_880), (9, 9, 9)), "BMP")
    photos = [encode(pillow.new("RGB", (1_000, 930), (i, 0, 0)), "BMP") for i in range(20)]
    assert 24_800_000 < len(largest) < 25_000_000 and len(photos[0]) > 2_700_000
    rows = list(ask_server(before_stock.removeprefix("http://"), [*photos, largest, b"junk"]))
    assert [row["error"] is None for row in rows] == [True] * 21 + [False]


def one_column(data: str) -> str:
    return json.dumps({"dataframe_split": {"columns": ["image"], "data": [[data]]}})


# What the stock server answers by itself, and what the proxy makes of it.
BADLY_DONE = {
    "no content type": ({"body": "{}", "content_type": None}, 500, 415),
    "CSV": ({"body": b"\xff", "content_type": "text/csv"}, 415, 415),
    "parquet": ({"body": "junk", "content_type": "application/vnd.apache.parquet"}, 400, 415),
    "no JSON": ({"body": "{"}, 400, 400),
    "an unknown encoding": (
        {"body": "{}", "content_type": "application/json; charset=latin-1"},
        415,
        415,
    ),
    "deep JSON": ({"body": "[" * 15_000}, 400, 400),
    "5,000 digits": ({"body": '{"inputs": [' + "9" * 5_000 + "]}"}, 400, 400),
    "1,001 images": ({"body": json.dumps({"inputs": ["A"] * 1001})}, 413, 413),
    "40 MB": ({"body": one_column("A" * 40 * MEGABYTE)}, 413, 413),
    "GET": ({}, 405, 405),
    "its own documentation": ({"path": "/docs"}, 200, 404),
}


@pytest.mark.slow
@needs_nginx
@pytest.mark.parametrize("name", BADLY_DONE)
def test_proxy_shuts_off_what_the_stock_server_does_badly(
    stock: tuple[str, Served], before_stock: str, name: str
) -> None:
    request, alone, behind = BADLY_DONE[name]
    by_itself = send(stock[0], **request)
    assert by_itself.status == alone
    assert "Traceback" not in by_itself.text
    answer = send(before_stock, **request)
    assert answer.status == behind and answer.error_code


def encode(image: pillow.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def inputs(files: Iterable[bytes]) -> bytes:
    return json.dumps({"inputs": [base64.b64encode(data).decode() for data in files]}).encode()


def different(data: bytes, count: int) -> Iterator[bytes]:
    """The same image, with other bytes behind it: nothing can be answered from memory."""
    return (data + i.to_bytes(4, "big") for i in range(count))


def small_images(count: int) -> list[bytes]:
    return [encode(pillow.new("RGB", (8, 8), (i % 256, i // 256, 0)), "PNG") for i in range(count)]


# Bodies that cost much more than they weigh, and how many clients send them again and again.
ATTACKS: dict[str, tuple[Callable[[], bytes], int]] = {
    "WebP of 50 megapixels, copies": (
        lambda: inputs([encode(pillow.new("RGB", (10_000, 5_000)), "WEBP", lossless=True)] * 1000),
        3,
    ),
    "WebP of 25 megapixels": (
        lambda: inputs(
            different(encode(pillow.new("RGB", (5_000, 5_000)), "WEBP", lossless=True), 1000)
        ),
        3,
    ),
    "WebP of 25 megapixels, 16 clients": (
        lambda: inputs(
            different(encode(pillow.new("RGBA", (5_000, 5_000)), "WEBP", lossless=True), 1000)
        ),
        16,
    ),
    "PNG of 40 megapixels": (
        lambda: inputs(
            different(encode(pillow.new("RGBA", (8_000, 5_000)), "PNG", optimize=True), 12)
        ),
        16,
    ),
    "GIF of 50 megapixels": (
        lambda: inputs(different(encode(pillow.new("L", (10_000, 5_000)), "GIF"), 12)),
        8,
    ),
    "one image of 50 megapixels each": (
        lambda: inputs([encode(pillow.new("RGB", (10_000, 5_000)), "JPEG", progressive=False)]),
        16,
    ),
    "1,000 small images": (lambda: inputs(small_images(1000)), 16),
    "a long row among short ones": (
        lambda: json.dumps(
            {"instances": [{"image": "A" * 20 * MEGABYTE}, *[{"image": "A"}] * 999]}
        ).encode(),
        4,
    ),
    "empty lists": (lambda: b'{"inputs": [' + b"[]," * 10 * MEGABYTE + b"[]]}", 4),
    "numbers": (lambda: b'{"inputs": [' + b"1," * 15 * MEGABYTE + b"1]}", 4),
    "deep JSON": (lambda: b'{"inputs": ' + b"[" * 9_000, 16),
    "long text that is not base64": (
        lambda: json.dumps({"inputs": ["AAAA" * 5 * MEGABYTE + "!"]}).encode(),
        8,
    ),
}


def wait_for_slot(address: str, body: bytes) -> None:
    for _ in range(120):
        if send(address, body=body).status == 200:
            return
        time.sleep(0.5)
    pytest.fail("the slots are never free again")


@pytest.mark.slow
@needs_nginx
@pytest.mark.parametrize("name", ATTACKS)
def test_others_are_answered_during_an_attack(
    stock: tuple[str, Served], before_stock: str, name: str
) -> None:
    build_body, clients = ATTACKS[name]
    body, over = build_body(), threading.Event()
    ends: list[int] = []

    def attack() -> None:
        while not over.is_set():
            with suppress(OSError):
                ends.append(send(before_stock, body=body, limit_s=10).status)
            time.sleep(0.1)

    normal = inputs([stock[1].photos[0]])
    # the attack before may still have all slots
    wait_for_slot(before_stock, normal)
    took = []
    with ThreadPoolExecutor(clients) as pool:
        try:
            for _ in range(clients):
                pool.submit(attack)
            time.sleep(2)
            for _ in range(4):
                started = time.monotonic()
                # an address of its own would be another client's; here it would be 429
                answer = send(stock[0], body=normal)
                took.append(time.monotonic() - started)
                assert answer.status == 200, answer
                assert json.loads(answer.text)["predictions"][0]["label"]
                time.sleep(0.5)
        finally:
            over.set()
    print(name, len(body), [round(each, 2) for each in took], Counter(ends))
    assert max(took) < 5, took
    # each attack ends in an answer or a refusal
    assert set(ends) <= {200, 400, 413, 429}


# Bodies that 64 clients send to the model server itself, again and again.
DIRECT_ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    # all of the server's threads wait
    "WebP of 25 megapixels": (ATTACKS["WebP of 25 megapixels, 16 clients"][0], "application/json"),
    # all that arrives and is parsed waits for Python's lock
    "text of 35 MB": (lambda: inputs([b"\x89PNG" * 6_500_000]), "application/json"),
    "escaped letters": (
        lambda: b'{"inputs": ["data:;base64,' + b"%2B" * 11_900_000 + b'"]}',
        "application/json",
    ),
    "CSV": (lambda: b"image\n" + b"A\n" * 17_000_000, "text/csv"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIRECT_ATTACKS)
def test_others_are_answered_during_an_attack_without_a_proxy(
    stock: tuple[str, Served], name: str
) -> None:
    build_body, kind = DIRECT_ATTACKS[name]
    body, over = build_body(), threading.Event()

    def attack() -> None:
        while not over.is_set():
            with suppress(OSError):
                send(stock[0], body=body, content_type=kind, limit_s=10)

    normal = inputs([stock[1].photos[0]])
    wait_for_slot(stock[0], normal)
    took = []
    with ThreadPoolExecutor(64) as pool:
        try:
            for _ in range(64):
                pool.submit(attack)
            time.sleep(3)
            for _ in range(4):
                started = time.monotonic()
                assert send(stock[0], body=normal).status == 200
                took.append(time.monotonic() - started)
        finally:
            over.set()
    assert max(took) < 5, took
    # the clients have left, and so the work for them ends
    started = time.monotonic()
    wait_for_slot(stock[0], normal)
    assert time.monotonic() - started < 5


@dataclass(frozen=True, kw_only=True)
class Image:
    """What a Dockerfile makes, in a folder: `environment` starts its commands in `folder`."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str) -> subprocess.CompletedProcess:
        # an earlier test's store is none of the image's
        around = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        return run(*command, cwd=self.folder, env={**around, **self.environment})


# These need root and touch the machine: they are read here, not run.
OF_THE_SYSTEM = {
    "useradd --create-home --uid 1000 har",
    "useradd --create-home --uid 1000 har && install --directory --owner har /mlflow",
}


def build(name: str, root: Path) -> Image:
    """Do what a Dockerfile says, instruction by instruction, with `root` for the file system."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the images have Python 3.11")
    subprocess.run([sys.executable, "-m", "venv", root / "venv"], check=True)
    image = Image(folder=root, environment={"PATH": f"{root}/venv/bin{os.pathsep}/usr/bin:/bin"})
    for kind, rest in instructions(name):
        if kind == "WORKDIR":
            image = replace(image, folder=root / rest.lstrip("/"))
            image.folder.mkdir(parents=True, exist_ok=True)
        elif kind == "ENV":
            pairs = dict(pair.split("=", 1) for pair in shlex.split(rest))
            image = replace(image, environment={**image.environment, **pairs})
        elif kind == "COPY":
            copy(rest.split(), image.folder)
        elif kind == "RUN" and rest not in OF_THE_SYSTEM:
            assert rest.startswith("pip install ")
            done = image.run("bash", "-c", rest)
            assert done.returncode == 0, done.stderr
        else:
            known = {"FROM", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "CMD"}
            assert kind in known
    return image


def copy(paths: list[str], folder: Path) -> None:
    """COPY as Docker does it: a folder's content goes into the target."""
    *sources, target = paths
    for source in sources:
        if (ROOT / source).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / source, folder / target, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy(ROOT / source, folder / target)


@pytest.mark.slow
def test_training_image_trains(tmp_path: Path) -> None:
    """Downloads TensorFlow's CUDA libraries: several GB."""
    image = build("Dockerfile", tmp_path)
    shown = image.run(*words("Dockerfile", "CMD"))
    assert shown.returncode == 0 and "Usage: har" in shown.stdout
    assert image.run("pip", "check").returncode == 0
    listed = image.run("pip", "list", "--format", "freeze").stdout
    assert f"nvidia-cudnn-cu12=={lock()['nvidia-cudnn-cu12']}" in listed
    small = ("--image-size", "32", "--epochs", "1", "--backbone", "efficientnet-lite0")
    trained = image.run("har", "run", "--data", "sample", *small)
    assert trained.returncode == 0, trained.stderr
    assert "v3" in trained.stdout and (image.folder / "mlflow.db").exists()


@pytest.mark.slow
@needs_nginx
def test_serving_image_serves_the_champion_behind_the_proxy(tmp_path: Path) -> None:
    image = build("Dockerfile.serve", tmp_path)
    assert image.run("pip", "check").returncode == 0
    assert image.run("python", "-c", "import har").returncode != 0
    services = compose(PLAIN)["services"]
    port = free_port()
    track = [
        word.replace(":5000", f":{port}").replace("/mlflow/", f"{tmp_path}/mlflow/")
        for word in services["mlflow"]["command"]
    ]
    (tmp_path / "mlflow").mkdir()
    around = {**image.environment, **services["mlflow"]["environment"]}
    with serving(track, port, tmp_path / "track.log", **around) as store:
        assert health(image, services["mlflow"]["healthcheck"]["test"][1:], "5000", port)
        assert status_for_host(store, "mlflow") == 200
        assert status_for_host(store, "foreign.example") == 403
        served = register_champion(store, tmp_path)
        serve_behind_proxy(image, store, served, tmp_path)


@pytest.mark.slow
def test_tracking_image_has_what_its_server_needs(tmp_path: Path) -> None:
    """What it does is in test_postgres.py."""
    image = build("Dockerfile.track", tmp_path)
    assert image.run("pip", "check").returncode == 0
    assert image.run("python", "-c", "import boto3, flask_wtf, psycopg").returncode == 0
    assert image.run("python", "-c", "import tensorflow").returncode != 0
    # compose.yaml names them there
    assert all((tmp_path / "app" / each).exists() for each in ("accounts.ini", "accounts.py"))
    for command in (words("Dockerfile.track", "CMD"), compose()["services"]["mlflow"]["command"]):
        shown = image.run(*command[:2], "--help")
        assert shown.returncode == 0 and "--artifacts-destination" in shown.stdout


def serve_behind_proxy(image: Image, store: str, served: Served, folder: Path) -> None:
    port, around = free_port(), {**image.environment, "MLFLOW_TRACKING_URI": store}
    ask = words("Dockerfile.serve", "HEALTHCHECK")
    assert not health(image, ask, "5001", port)
    command = words("Dockerfile.serve", "CMD")
    log = folder / "serve.log"
    with serving(command, port, log, **around), proxy(port) as address:
        assert health(image, ask, "5001", port)
        served.check(send(address, body=served.body()))
    # the image's versions are those the model was evaluated with
    assert "mismatch" not in log.read_text()


def health(image: Image, command: list[str], written: str, port: int) -> bool:
    """A health check of the files, asked of another port."""
    moved = [word.replace(f":{written}/", f":{port}/") for word in command]
    assert moved != command
    return image.run(*moved).returncode == 0


def status_for_host(address: str, host: str) -> int:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    path = "/api/2.0/mlflow/experiments/get?experiment_id=0"
    connection.request("GET", path, headers={"Host": f"{host}:{address.rpartition(':')[2]}"})
    return connection.getresponse().status
