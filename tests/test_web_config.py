"""The web configuration: TLS, client certificates, passwords; bad ones refused in a sentence, changes taken up."""

from __future__ import annotations

import asyncio
import base64
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import bcrypt
import pytest
import reports
from daemons import PROGRAM, Daemon, await_true, prometheus, running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from doctor.door import login, server, web_config
from doctor.door.address import DoorError
from doctor.door.web_config import WebConfigFile, read

PASSWORD = "open-sesame"
SALT = b"$2b$04$abcdefghijklmnopqrstuu"  # fixed, since a test's name may hold the hash
HASH = bcrypt.hashpw(PASSWORD.encode(), SALT).decode()
MUTUAL = "  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca.pem\n"


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def certificate(folder: Path, name: str, extra: str) -> None:
    """Make NAME.pem and NAME.key, signed by ca.pem."""
    openssl(folder, "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key",
            "-out", f"{name}.csr", "-subj", f"/CN={name}")  # fmt: skip
    # Python 3.13 verifies strictly: the identifiers and the CA's usage must be there.
    (folder / f"{name}.ext").write_text(f"{extra}subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n")
    openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", "30", "-out", f"{name}.pem", "-extfile", f"{name}.ext")  # fmt: skip


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CA, a server, two clients of that CA, and a stranger who signed for himself."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on this machine")
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ca", "stranger"):
        openssl(folder, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout",
                f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}", "-days", "30",
                "-addext", "keyUsage=critical,keyCertSign,cRLSign")  # fmt: skip
    certificate(folder, "server", "subjectAltName=IP:127.0.0.1\n")
    certificate(folder, "newer", "subjectAltName=IP:127.0.0.1\n")
    certificate(folder, "scraper", "subjectAltName=DNS:scraper.example\n")
    certificate(folder, "other", "subjectAltName=DNS:other.example\n")
    openssl(folder, "ec", "-in", "server.key", "-out", "locked.key", "-aes256", "-passout", "pass:x")
    return folder


@pytest.fixture
def folder(keys: Path, tmp_path: Path) -> Path:
    """A copy of the keys that a test may change."""
    shutil.copytree(keys, tmp_path, dirs_exist_ok=True)
    return tmp_path


TLS = "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "web.yml"
    path.write_text(text)
    return path


def client(folder: Path, name: str = "") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    if name:
        context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    return context


def basic(password: str, user: str = "prometheus") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


Start = Callable[[str], Daemon]


@pytest.fixture
def daemon_of(folder: Path) -> Iterator[Start]:
    made: list[Daemon] = []
    with ExitStack() as started:

        def start(text: str) -> Daemon:
            path = folder / f"web{len(made)}.yml"
            path.write_text(text)
            made.append(started.enter_context(running(PROGRAM, "lost", "0.2", "127.0.0.1:0", str(path))))
            return made[-1]

        yield start


def refused(daemon: Daemon, tls: ssl.SSLContext | None) -> bool:
    try:
        daemon.ask("/healthz", tls=tls)
    except OSError:
        return True
    except Exception as e:
        return type(e).__name__ == "BadStatusLine"
    return False


def test_tls_is_spoken_and_nothing_else(daemon_of: Start, folder: Path) -> None:
    daemon = daemon_of(TLS)
    await_true(lambda: daemon.ask("/healthz", tls=client(folder))[0] == 200)
    assert refused(daemon, None), "plain HTTP"
    old = client(folder)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert daemon.ask("/metrics", tls=old)[0] == 200


def test_a_minimum_version_is_kept(daemon_of: Start, folder: Path) -> None:
    daemon = daemon_of(TLS + "  min_version: TLS13\n")
    await_true(lambda: daemon.ask("/healthz", tls=client(folder))[0] == 200)
    old = client(folder)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert refused(daemon, old)


def test_only_clients_of_the_ca_come_in(daemon_of: Start, folder: Path) -> None:
    daemon = daemon_of(TLS + MUTUAL)
    await_true(lambda: daemon.ask("/healthz", tls=client(folder, "scraper"))[0] == 200)
    assert refused(daemon, client(folder)), "no certificate"
    assert refused(daemon, client(folder, "stranger"))


def test_only_clients_with_an_allowed_name_come_in(daemon_of: Start, folder: Path) -> None:
    daemon = daemon_of(TLS + MUTUAL + "  client_allowed_sans: [scraper.example]\n")
    await_true(lambda: daemon.ask("/healthz", tls=client(folder, "scraper"))[0] == 200)
    assert refused(daemon, client(folder, "other"))


def test_a_password_is_needed_for_everything(daemon_of: Start) -> None:
    daemon = daemon_of(f"basic_auth_users:\n  prometheus: {HASH}\n")
    for path in ("/", "/metrics", "/healthz", "/report", "/nothing"):
        status, headers, body = daemon.ask(path)
        assert (status, headers["www-authenticate"][:6]) == (401, "Basic ")
        assert b"gpu" not in body
    await_true(lambda: daemon.ask("/healthz", headers=basic(PASSWORD))[0] == 200)
    for wrong in (basic("x"), basic(PASSWORD, "root"), {"Authorization": "Bearer x"}, {"Authorization": "Basic ?"}):
        assert daemon.ask("/metrics", headers=wrong)[0] in (401, 429)


def test_headers_of_the_configuration_replace_the_own_ones(daemon_of: Start) -> None:
    daemon = daemon_of("http_server_config:\n  http2: true\n  headers:\n    X-Frame-Options: sameorigin\n")
    assert daemon.ask("/healthz")[1]["x-frame-options"] == "sameorigin"


def test_a_changed_certificate_and_file_are_taken_up_and_a_bad_one_is_not(daemon_of: Start, folder: Path) -> None:
    daemon = daemon_of(TLS)
    await_true(lambda: daemon.ask("/healthz", tls=client(folder))[0] == 200)

    def serial() -> str:
        context = client(folder)
        with (
            socket.create_connection((daemon.host, daemon.port)) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1") as tls,
        ):
            return str((tls.getpeercert() or {})["serialNumber"])

    before = serial()
    shutil.copy(folder / "newer.pem", folder / "server.pem")  # a certificate without its key: half a rotation
    daemon.await_event("web configuration is bad, the one before stays in force")
    assert serial() == before
    await_true(
        lambda: b"\ngpu_doctor_web_config_reload_successful 0.0\n" in daemon.ask("/metrics", tls=client(folder))[2]
    )
    shutil.copy(folder / "newer.key", folder / "server.key")
    await_true(lambda: serial() != before)
    (folder / "web0.yml").write_text(TLS + MUTUAL)
    await_true(lambda: refused(daemon, client(folder)))
    tls = client(folder, "scraper")
    assert daemon.ask("/healthz", tls=tls)[0] == 200
    await_true(lambda: b"\ngpu_doctor_web_config_reload_successful 1.0\n" in daemon.ask("/metrics", tls=tls)[2])
    bad = [e for e in daemon.log if "is bad" in str(e["event"])]
    assert len(bad) == 1, "told once"
    assert "the key is not that of the certificate" in str(bad[0]["error"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tls_server_config: [", ":1: not YAML"),
        ("a: 1\nb: 1", ":1: a is no setting of the web configuration; there are tls_server_config"),
        ("- x", ":1: the web configuration must hold settings"),
        ("basic_auth_users:\n  joe: secret-word", ":2: joe has no bcrypt hash"),
        (f"basic_auth_users:\n  a: {HASH}\n  a: {HASH}", ":3: a stands twice in basic_auth_users"),
        (f"basic_auth_users:\n  a: {HASH.replace('$04$', '$17$')}", ":2: a has a hash of cost 17"),
        ("tls_server_config:\n  cert_file: server.pem", ":1: tls_server_config needs key_file"),
        ("tls_server_config:\n  cert_file: none.pem\n  key_file: server.key", ":2: cert_file and key_file can't be used"),
        ("tls_server_config:\n  cert_file: server.pem\n  key_file: ca.key", "the key is not that of the certificate"),
        ("tls_server_config:\n  cert_file: server.pem\n  key_file: locked.key", ":2: cert_file and key_file can't be"),
        ("tls_server_config:\n  cert_file: web.yml\n  key_file: web.yml", ":2: cert_file and key_file can't be used"),
        (TLS + "  cipher_suites: [A]", ":4: cipher_suites is not supported: OpenSSL"),
        (TLS + "  client_auth_type: RequireAnyClientCert", ":4: client_auth_type: RequireAnyClientCert is not supported"),
        (TLS + "  client_auth_type: RequireAndVerifyClientCert", ":4: client_auth_type: RequireAndVerifyClientCert needs"),
        (TLS + "  client_ca_file: ca.pem", ":4: client_ca_file does nothing without client_auth_type"),
        (TLS + "  client_allowed_sans: [a]", ":4: client_allowed_sans needs client_auth_type"),
        (TLS + "  min_version: TLS10", ":4: min_version: TLS10 is not supported: it is insecure"),
        (TLS + "  min_version: TLS14", ":4: min_version: there is no 'TLS14'; there are TLS12 and TLS13"),
        (TLS + "  min_version: TLS13\n  max_version: TLS12", ":4: min_version is above max_version"),
        (TLS + "  cert_fil: x", ":4: cert_fil is no setting of tls_server_config"),
        ("rate_limit: {}", ":1: rate_limit is not supported: the door bounds its clients itself"),
        ("http_server_config:\n  headers:\n    X-Evil: 1", ":3: X-Evil is no setting of headers"),
        ('http_server_config:\n  headers:\n    X-Frame-Options: "a\\nb"', ":3: X-Frame-Options must be printable"),
        ("http_server_config:\n  http2: maybe", ":2: http2 must be true or false"),
    ],
)  # fmt: skip
def test_a_bad_configuration_is_refused_with_file_and_line(folder: Path, text: str, said: str) -> None:
    path = written(folder, text)
    with pytest.raises(DoorError) as e:
        read(path)
    assert str(e.value).startswith(f"{path}")
    assert said in str(e.value)
    assert "\n" not in str(e.value)
    assert "secret-word" not in str(e.value)


def test_the_example_of_the_documentation_is_one(folder: Path) -> None:
    text = (Path(__file__).parent.parent / "docs/daemon.md").read_text()
    example = text.partition("<!-- web configuration -->\n```yaml\n")[2].partition("```\n<!-- end of")[0]
    config = read(written(folder, example))
    assert config.tls is not None
    assert config.tls.minimum_version is ssl.TLSVersion.TLSv1_3
    assert config.tls.verify_mode is ssl.CERT_REQUIRED
    assert config.client_names == {"prometheus.example"}
    assert list(config.users) == ["prometheus"]
    assert list(config.headers) == ["Strict-Transport-Security"]


def test_a_bad_configuration_at_the_start_ends_the_program_with_3(folder: Path) -> None:
    for option in ("--web-config", "--web.config.file"):
        done = subprocess.run(
            [sys.executable, "-m", "doctor", "daemon", "--listen", "127.0.0.1:0", option, str(folder / "none.yml")],
            capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (3, f"gpu-doctor: {folder}/none.yml: No such file or directory\n")


def test_a_configuration_without_the_extra_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_config.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DoorError, match=r"pip install 'gpu-node-doctor\[web\]'"):
        read(written(folder, TLS))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=80),
        st.text(alphabet="tls_server_config: \n-[]{}&*!|>'\"#%@0~<", max_size=80).map(str.encode),
    )
)
def test_any_bytes_are_read_or_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "web.yml"
    path.write_bytes(raw)
    try:
        said = str(read(path).headers)
    except DoorError as e:
        said = str(e)
    assert said.isprintable()


def test_an_unchanged_file_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = WebConfigFile(written(folder, TLS))
    before = file.current
    assert not file.reread()
    assert file.current is before
    written(folder, TLS + "  min_version: TLS13\n")
    assert file.reread()
    written(folder, "nonsense")
    with pytest.raises(DoorError):
        file.reread()
    assert not file.reread(), "told once"
    assert (file.loaded, file.current.tls is not None) == (False, True)


# Passwords ---------------------------------------------------------------------------------------------------------


def header(password: str, user: str = "prometheus") -> str:
    return basic(password, user)["Authorization"]


USERS = {"prometheus": HASH.encode()}


def checks(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return what bcrypt is asked from now on."""
    asked: list[bytes] = []
    real = bcrypt.checkpw

    def check(password: bytes, right: bytes) -> bool:
        asked.append(password)
        return real(password, right)

    monkeypatch.setattr(bcrypt, "checkpw", check)
    return asked


def test_a_right_and_a_wrong_password_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = checks(monkeypatch)

    async def ask() -> list[login.Answer]:
        keeper = login.Doorkeeper()
        answers = [await keeper.answer(header(p), USERS, "h") for p in (PASSWORD, "x", PASSWORD, "x", PASSWORD)]
        keeper.close()
        return answers

    welcome, wrong = login.Answer.WELCOME, login.Answer.WRONG
    assert asyncio.run(ask()) == [welcome, wrong, welcome, wrong, welcome]
    assert asked == [PASSWORD.encode(), b"x"]


def test_a_changed_password_is_asked_anew() -> None:
    async def ask() -> list[login.Answer]:
        keeper = login.Doorkeeper()
        changed = {"prometheus": bcrypt.hashpw(b"new", bcrypt.gensalt(4))}
        answers = [await keeper.answer(header(PASSWORD), users, "h") for users in (USERS, changed, USERS)]
        keeper.close()
        return answers

    assert [a.name for a in asyncio.run(ask())] == ["WELCOME", "WRONG", "WELCOME"]


def test_a_user_that_is_none_costs_what_a_user_costs_and_never_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = checks(monkeypatch)

    async def ask() -> login.Answer:
        keeper = login.Doorkeeper()
        answer = await keeper.answer(header(PASSWORD, "nobody"), USERS, "h")
        keeper.close()
        return answer

    assert asyncio.run(ask()) is login.Answer.WRONG
    assert len(asked) == 1


def test_guessing_takes_a_tenth_of_a_core_and_does_not_lock_out_who_was_let_in() -> None:
    users = {"prometheus": bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(8))}

    async def ask() -> tuple[float, float, list[login.Answer], list[login.Answer]]:
        keeper = login.Doorkeeper()
        assert await keeper.answer(header(PASSWORD), users, "honest") is login.Answer.WELCOME
        began, cpu = time.monotonic(), time.process_time()
        guesses: list[asyncio.Task[login.Answer]] = []
        honest: list[login.Answer] = []
        while time.monotonic() - began < 1.5:
            guesses += [
                asyncio.create_task(keeper.answer(header(f"guess {len(guesses)} {n}"), users, f"host {n}"))
                for n in range(20)
            ]
            await asyncio.sleep(0.05)
            honest.append(await keeper.answer(header(PASSWORD), users, "honest"))
        spent, took = time.process_time() - cpu, time.monotonic() - began
        answers = [task.result() for task in guesses if task.done()]
        for task in guesses:
            task.cancel()
        keeper.close()
        return spent, took, honest, answers

    spent, took, honest, answers = asyncio.run(ask())
    assert set(honest) == {login.Answer.WELCOME}
    assert login.Answer.BUSY in answers
    assert spent / took < 0.35, "a tenth for bcrypt; the rest is this test's own work"


@given(st.text(max_size=60))
def test_any_authorization_header_has_an_answer(text: str) -> None:
    async def ask() -> login.Answer:
        keeper = login.Doorkeeper()
        try:
            return await keeper.answer(text, USERS, "h")
        finally:
            keeper.close()

    assert asyncio.run(ask()) is login.Answer.WRONG


# A real Prometheus -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not on this machine")
def test_a_real_prometheus_comes_in(daemon_of: Start, folder: Path) -> None:
    with_ca = f"scheme: https\ntls_config:\n  ca_file: {folder}/ca.pem\n"
    with_key = f"  cert_file: {folder}/scraper.pem\n  key_file: {folder}/scraper.key\n"
    with_password = f"basic_auth:\n  username: prometheus\n  password: {PASSWORD}\n"
    users = f"basic_auth_users:\n  prometheus: {HASH}\n"
    mutual, password = daemon_of(TLS + MUTUAL), daemon_of(users)
    jobs = {
        "tls": (daemon_of(TLS), with_ca),
        "mutual": (mutual, with_ca + with_key),
        "password": (password, with_password),
        "both": (daemon_of(TLS + users), with_ca + with_password),
        "stranger": (mutual, with_ca),
        "forgetful": (password, with_password.replace(PASSWORD, "x")),
    }
    with prometheus(folder, jobs) as asked:
        await_true(lambda: len(asked('gpu_doctor_finding{failure_mode="gpu-lost"}')) == 4)
        found = asked('gpu_doctor_finding{failure_mode="gpu-lost"}')
        assert {each["metric"]["job"] for each in found} == {"tls", "mutual", "password", "both"}
        assert {each["metric"]["uuid"] for each in found} == {reports.uuid(2)}
        await_true(lambda: {e["metric"]["job"] for e in asked("up == 0")} == {"stranger", "forgetful"})


def test_a_client_that_never_shakes_hands_holds_up_nobody(daemon_of: Start, folder: Path) -> None:
    daemon = daemon_of(TLS)
    silent = [socket.create_connection((daemon.host, daemon.port)) for _ in range(2 * server.GUESTS_MAX)]
    try:
        began = time.monotonic()
        await_true(lambda: daemon.ask("/healthz", tls=client(folder))[0] == 200)
        assert time.monotonic() - began < server.REQUEST_SECONDS, "it waits for none of them"
    finally:
        for each in silent:
            each.close()
