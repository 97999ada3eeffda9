# SPDX-License-Identifier: Apache-2.0
"""The network: a way out by either helper, none, published ports, a LAN between guests."""

import contextlib
import hashlib
import http.server
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodes import (
    DEADLINE_S,
    TOP,
    UNPRIVILEGED,
    assert_error,
    assert_told,
    change_image,
    kernel_has,
    list_children,
    make_node,
    mounted,
    needs_root,
    read_cpu_time,
    require,
    send,
    skip_unless,
    wait_for,
    wait_for_state,
    writable_copy,
    write_into,
)

import apppot_init
import apppot_start
from apppot_start import Fatal, Lan, Port, parse_lan, parse_port

NONCE = os.urandom(8).hex()
SIZE = 64 << 20
NOWHERE = {"PATH": "/nonexistent"}  # without a helper


@pytest.fixture(params=["slirp4netns", "slirp"])
def helper(request, kernel):
    """The name of a helper that this machine has and the kernel has a driver for."""
    programs = [name for name, kind in apppot_start.HELPERS.items() if kind == request.param]
    require(
        any(map(shutil.which, programs)), f"no {request.param}: apt-get install {request.param}"
    )
    driver = {"slirp4netns": "CONFIG_UML_NET_VECTOR", "slirp": "CONFIG_UML_NET_SLIRP"}[
        request.param
    ]
    skip_unless(kernel_has(kernel, driver), f"this kernel has no driver for {request.param}")
    return request.param


@pytest.fixture(scope="session")
def web():
    """A web server on the host's loopback: its port, what it serves, and what it was asked for."""
    content = os.urandom(1 << 20) * (SIZE >> 20)
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content)

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, hashlib.sha256(content).hexdigest(), asked
        server.shutdown()


def free_port(kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def script(node, name, text):
    path = node.root / name
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def name_of(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/comm").read_text()
    except OSError:  # it has ended meanwhile, as those of the guest do
        return ""


def process_named(node, name):
    found = [pid for pid in node.processes() if name_of(pid).startswith(name)]
    assert len(found) == 1, (name, found)
    return found[0]


# --- The way out ----------------------------------------------------------------------------------


def test_64_mib_from_the_host_s_loopback_arrive_intact(any_node, helper, web):
    port, digest, _ = web
    result = any_node.run(
        "--net", helper, "sh", "-c", f"curl -sS http://10.0.2.2:{port}/ | sha256sum"
    )
    assert (result.stdout.decode().split()[0], result.stderr) == (digest, b"")


def test_64_mib_to_the_host_arrive_intact(node, helper):
    with socket.create_server(("127.0.0.1", 0)) as server:
        send = (
            "import socket, hashlib, os; data = os.urandom(1 << 20); s = socket.socket()\n"
            f"s.connect(('10.0.2.2', {server.getsockname()[1]}))\n"
            "for i in range(64): s.sendall(data)\n"
            "s.close(); print(hashlib.sha256(data * 64).hexdigest())"
        )
        process = node.start("--net", helper, "python3", "-c", send)
        server.settimeout(DEADLINE_S)
        connection, _ = server.accept()
        digest = hashlib.sha256()
        with connection, connection.makefile("rb") as file:
            for piece in iter(lambda: file.read(1 << 16), b""):
                digest.update(piece)
        assert node.finish(process) == (0, digest.hexdigest().encode() + b"\n", b"")


class NameServer:
    """Knows one name, on an address of 127.0.0.0/8 that no other test run has."""

    def __init__(self):
        self.address = "127.{}.{}.{}".format(*(1 + byte % 254 for byte in os.urandom(3)))
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((self.address, 53))
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError):  # at the end it is closed
            while True:
                query, client = self.socket.recvfrom(512)
                question = query[12 : query.index(b"\0", 12) + 5]
                known = (
                    question.startswith(bytes([len(NONCE)]) + NONCE.encode()) and question[-3] == 1
                )
                answer = b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + bytes([192, 0, 2, 77]) if known else b""
                self.socket.sendto(
                    query[:2]
                    + b"\x81\x80\0\1"
                    + struct.pack(">HHH", known, 0, 0)
                    + question
                    + answer,
                    client,
                )


@needs_root
def test_names_resolve_by_the_name_server_of_the_host(node, helper):
    server = NameServer()
    (node.root / "resolv.conf").write_text(f"nameserver {server.address}\n")
    wrap = mounted(f"mount --bind {node.root}/resolv.conf /etc/resolv.conf")
    process = node.start("--net", helper, "getent", "ahostsv4", NONCE + ".example", wrap=wrap)
    status, stdout, stderr = node.finish(process)
    server.socket.close()
    assert (status, stdout.split()[0], stderr) == (0, b"192.0.2.77", b"")


@pytest.mark.own_kernel
@pytest.mark.parametrize("kind", ["file", "missing", "link to nothing", "link"])
def test_the_image_s_resolv_conf_is_of_no_matter(node, image, kind):
    own = writable_copy(node, image)
    (node.root / "resolv").write_text("nameserver 192.0.2.1\n")
    write_into(own, node.root / "resolv", "/etc/resolv.conf")
    commands = {
        "file": "",
        "missing": "rm /etc/resolv.conf",
        "link to nothing": (
            "rm /etc/resolv.conf\nsymlink /etc/resolv.conf ../run/systemd/resolve/stub-resolv.conf"
        ),
        "link": "rm /etc/resolv.conf\nsymlink /etc/resolv.conf /etc/hostname",
    }
    change_image(own, commands[kind])
    expected = {"file": b"nameserver 192.0.2.1\n", "link": b"apppot\n"}

    show = ("cat", "/etc/resolv.conf")
    assert node.run("--net", "none", *show, image=own).stdout == expected.get(kind, b"")
    assert node.run(*show, image=own).stdout.startswith(b"nameserver 10.0.2.3\n")


def test_runs_at_once_have_networks_of_their_own(any_node, helper, web):
    port, digest, _ = web
    command = (
        "--net", helper, "--mem", "256", "sh", "-c",
        f"curl -sS http://10.0.2.2:{port}/ | sha256sum",
    )
    processes = [any_node.start(*command) for _ in range(6)]
    for process in processes:
        status, stdout, stderr = any_node.finish(process)
        assert (status, stdout.decode().split()[0], stderr) == (0, digest, b"")


def test_a_suspended_run_goes_on_with_its_network(node, helper, web):
    port, digest, _ = web
    process = node.start_ready(f"curl -sS http://10.0.2.2:{port}/ | sha256sum", "--net", helper)
    process.send_signal(signal.SIGTSTP)
    wait_for_state([process.pid], "T")
    time.sleep(1)  # suspended for a while
    process.send_signal(signal.SIGCONT)

    status, stdout, _ = node.finish(process)
    assert (status, stdout.decode().split()[0]) == (0, digest)


@pytest.mark.parametrize("helper", ["slirp"], indirect=True)
def test_the_guest_has_slirp_run_no_program_of_the_host(node, kernel, helper):
    """Its control address and its emulation of rlogin and rsh would."""
    talk = """
import socket
for host, port, source, words in (
    ("10.0.2.0", 7, 0, b"exec /usr/bin/id\\r\\n"),
    ("10.0.2.1", 23, 0, b"id\\r\\n"),
    ("10.0.2.1", 21, 0, b""),
    ("10.0.2.7", 513, 800, b"\\0me\\0you\\0vt/9600\\0"),
    ("10.0.2.7", 514, 801, b"0\\0me\\0you\\0id\\0"),
):
    s = socket.socket()
    s.settimeout(3)
    try:
        s.bind(("", source))
        s.connect((host, port))
        s.sendall(words)
        while True:
            said = s.recv(4096)
            print(said)
            if not said:
                break
    except OSError as error:
        print(error)
"""

    result = node.run("--net", "slirp", "--root", "python3", "-c", talk)
    assert result.returncode == 0 and b"uid=" not in result.stdout and b"ready" not in result.stdout
    assert (
        result.stdout.count(b"Permission denied") == 3
        and b"execvp of rlogin failed" in result.stdout
    )


# --- No way out -----------------------------------------------------------------------------------

LOOK = (
    "grep -c : /proc/net/dev; wc -l < /proc/net/route; "
    "for host in 10.0.2.2 127.0.0.1; do curl -sS -m 3 http://$host:{}/none || echo no; done; "
    "getent hosts localhost.localdomain.example || echo no"
)


def test_net_none_leaves_no_way_out_even_to_root(any_node, web):
    port, _, asked = web
    for options in ((), ("--root",)):
        result = any_node.run("--net", "none", *options, "sh", "-c", LOOK.format(port))
        # There is one interface and no route, and nothing is reached.
        assert result.stdout == b"1\n1\nno\nno\nno\n", result
    assert "/none" not in asked


def test_without_a_helper_the_run_has_no_network_and_v_says_so(any_node):
    count = ("sh", "-c", "grep -c : /proc/net/dev")
    result = any_node.run(*count, env=NOWHERE)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"1\n", b"")
    assert b"no network: no slirp4netns" in any_node.run("-v", *count, env=NOWHERE).stderr
    assert b"no network: --net none" in any_node.run("-v", "--net", "none", *count).stderr


# --- Which helper ---------------------------------------------------------------------------------


def test_a_helper_staged_in_beside_the_runner_comes_first_and_gets_its_execute_bit(
    any_node, helper, web
):
    port, digest, _ = web
    program = next(
        filter(None, map(shutil.which, [n for n, k in apppot_start.HELPERS.items() if k == helper]))
    )
    staged = any_node.root / os.path.basename(program)
    shutil.copyfile(program, staged)
    os.chown(staged, any_node.uid, -1)

    result = any_node.run("-v", "sh", "-c", f"curl -sS http://10.0.2.2:{port}/ | sha256sum")
    assert (
        result.stdout.decode().split()[0] == digest
        and f"network by {staged}\n".encode() in result.stderr
    )


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_helper_of_either_kind_is_known_by_what_it_says(node, helper, by):
    program = next(
        filter(None, map(shutil.which, [n for n, k in apppot_start.HELPERS.items() if k == helper]))
    )
    link = node.root / "a, b 'c: d_e"
    link.symlink_to(program)
    options, environment = (
        (("--slirp", str(link)), {}) if by == "option" else ((), {"APPPOT_SLIRP": str(link)})
    )

    result = node.run(
        *options, "sh", "-c", "cut -d : -f 1 /proc/net/dev | tail -n 1",
        env={**NOWHERE, **environment},
    )
    assert result.stdout.strip() == (b"vec0" if helper == "slirp4netns" else b"eth0"), result.stderr


BAD_HELPERS = {
    "missing": None,
    "crash": "echo no more >&2; kill -SEGV $$",
    "other": "echo some other program",
    "old": "echo slirp4netns version 0.4.3",
    "ends": (
        'if [ "$1" = --version ]; then echo slirp4netns version 1.2.0; else echo broken >&2; '
        "exit 3; fi"
    ),
    "hangs": (
        'if [ "$1" = --version ]; then echo slirp4netns version 1.2.0; else echo stuck >&2; '
        "sleep 100; fi"
    ),
}
COMPLAINTS = {
    "missing": "No such file", "crash": "signal 11", "other": "some other program",
    "old": "too old", "ends": "broken", "hangs": "stuck",
}


@pytest.mark.own_kernel
@pytest.mark.parametrize("kind", BAD_HELPERS)
def test_a_helper_asked_for_that_is_no_use_is_an_error(any_node, kind):
    path = (
        str(any_node.root / "none")
        if BAD_HELPERS[kind] is None
        else script(any_node, "help", BAD_HELPERS[kind])
    )

    result = any_node.run("--slirp", path, "echo", "up")
    assert (result.returncode, result.stdout) == (125, b"")
    assert_error(result, path, COMPLAINTS[kind])


# slirp starts only when the guest is up.
@pytest.mark.parametrize("helper", ["slirp4netns"], indirect=True)
def test_a_helper_that_dies_during_the_boot_is_an_error(node, helper):
    program = shutil.which("slirp4netns")
    die = f'[ "$1" = --version ] || exec timeout -s KILL 0.5 {program} "$@"; exec {program} "$@"'
    path = script(node, "help", die)
    result = node.run("--slirp", path, "--extra", "rootdelay=3", "true")
    assert result.returncode == 125
    assert_error(result, path, "was killed")


def test_a_helper_not_asked_for_that_is_no_use_is_a_warning(node):
    path = script(node, "slirp4netns", "echo cannot load libslirp >&2; exit 127")
    result = node.run("sh", "-c", "grep -c : /proc/net/dev", env=NOWHERE)
    assert (result.returncode, result.stdout) == (0, b"1\n")
    assert re.fullmatch(
        f"apppot: warning: no network: {path} .*cannot load libslirp\n", result.stderr.decode()
    )


@pytest.mark.parametrize("name", ["slirp4netns", "slirp"])
def test_a_helper_asked_for_by_name_that_is_not_here_is_an_error(node, kernel, name):
    result = node.run("--net", name, "true", env=NOWHERE)
    assert result.returncode == 125
    features = apppot_start.read_features(str(kernel))
    is_driven = features.vector_network if name == "slirp4netns" else features.slirp_network
    assert_error(result, "no network helper" if is_driven else f"no driver for {name}")


def test_what_the_kernel_has_no_driver_for_is_an_error_when_asked_for(node, kernel, web):
    """A kernel that says so; the real ones that lack it are newer than Debian 12's."""
    content = kernel.read_bytes()
    for name in (b"VECTOR", b"SLIRP", b"MCAST"):
        setting = b"CONFIG_UML_NET_" + name
        content = content.replace(setting + b"=y", setting + b"=n")

    (node.root / "linux").unlink()
    (node.root / "linux").write_bytes(content)
    (node.root / "linux").chmod(0o755)

    for options in (
        ("--net", "slirp"), ("--net", "slirp4netns"), ("--publish", "8080:80"), ("--lan",),
    ):
        result = node.run(*options, "true")
        assert result.returncode == 125
        assert_error(result, "kernel has no", node.root / "linux")
    assert node.run("sh", "-c", "grep -c : /proc/net/dev").stdout == b"1\n"


@pytest.mark.own_kernel
def test_options_that_contradict_each_other_are_refused(node):
    for options in (
        ("--net", "none", "--slirp", "x"),
        ("--net", "none", "--publish", "8080:80"),
        ("--net", "x"),
    ):
        result = node.run(*options, "true")
        assert result.returncode == 125
        assert_error(result, "--net")


# --- The helper's end -----------------------------------------------------------------------------


def test_a_command_outlives_its_helper_without_a_network(node, helper, web):
    port = web[0]
    process = node.start_ready(
        f"read line; curl -s -m 5 http://10.0.2.2:{port}/ || echo no; read line; echo end", "--net",
        helper, stdin=subprocess.PIPE,
    )
    os.kill(process_named(node, "slirp"), signal.SIGKILL)
    if helper == "slirp4netns":
        assert b"warning: network helper was killed" in process.stderr.readline()
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"no\n"

    kernel = kernel_of(process.pid)
    used = read_cpu_time([kernel])
    time.sleep(1)
    assert read_cpu_time([kernel]) - used < 0.5, "the kernel is busy with the dead end"

    process.stdin.close()
    assert (process.stdout.read(), process.wait(DEADLINE_S)) == (b"end\n", 0)


def kernel_of(runner):
    supervisor = list_children(runner)[0]
    return next(pid for pid in list_children(supervisor) if "slirp" not in name_of(pid))


@pytest.mark.parametrize("victim", ["runner", "supervisor", "kernel", "all"])
def test_the_helper_ends_with_the_run_however_that_ends(any_node, helper, victim):
    process = any_node.start_ready("exec sleep 100", "--net", helper)
    supervisor = list_children(process.pid)[0]
    victims = {
        "runner": [process.pid], "supervisor": [supervisor], "kernel": [kernel_of(process.pid)],
    }
    victims["all"] = sum(victims.values(), [])
    pid_of_helper = process_named(any_node, "slirp")

    if victim == "all":
        # None has time to clean up then. One that stops alone would be a suspended run.
        for pid in victims[victim]:
            os.kill(pid, signal.SIGSTOP)

    for pid in victims[victim]:
        os.kill(pid, signal.SIGKILL)
    any_node.finish(process)
    if victim == "all":  # what 6.1 leaves of the kernel itself is not the subject
        send(set(any_node.processes()) - {pid_of_helper}, signal.SIGKILL)
    wait_for(lambda: pid_of_helper not in any_node.processes())
    if victim == "all":
        assert any_node.run("true").returncode == 0  # removes the directory
    any_node.wait_until_gone(10)
    wait_for(lambda: not os.listdir(any_node.scratch))


# --- Published ports ------------------------------------------------------------------------------

SERVE = (
    "import socket; s = socket.socket(type=socket.{}); s.bind(('', {}))\n"
    "if s.type == socket.SOCK_STREAM: s.listen()\n"
    "print('ready', flush=True)\n"
    "if s.type == socket.SOCK_STREAM:\n"
    "    c = s.accept()[0]; c.sendall(b'{}' + c.recv(9))\n"
    "else:\n"
    "    said, peer = s.recvfrom(9); s.sendto(b'{}' + said, peer); s.recv(1)\n"
)


@pytest.mark.parametrize(
    "host, kind, suffix",
    [
        ("", "SOCK_STREAM", ""),
        ("127.0.0.1:", "SOCK_STREAM", "/tcp"),
        ("127.0.0.9:", "SOCK_STREAM", ""),
        ("127.0.0.9:", "SOCK_DGRAM", "/udp"),
        ("0.0.0.0:", "SOCK_DGRAM", "/udp"),
    ],
)
def test_a_published_port_of_the_guest_answers_on_the_host(any_node, kind, suffix, host):
    port = free_port(getattr(socket, kind))
    code = SERVE.format(kind, 8000, NONCE, NONCE)
    process = any_node.start("--publish", f"{host}{port}:8000{suffix}", "python3", "-c", code)
    assert process.stdout.readline() == b"ready\n", process.stderr.read()

    with socket.socket(type=getattr(socket, kind)) as client:
        client.settimeout(DEADLINE_S)
        client.connect((host[:-1] if host.startswith("127") else "127.0.0.1", port))
        client.sendall(b" hello")
        assert client.recv(99) == NONCE.encode() + b" hello"

    if not host.startswith("0"):  # and nowhere else
        with socket.socket(type=getattr(socket, kind)) as other:
            other.bind(("127.0.0.2", port))

    process.terminate()
    any_node.finish(process)


def test_a_guest_s_web_server_is_published_beside_another_port(any_node):
    web, other = free_port(), free_port()
    (any_node.job / "index.html").write_text(NONCE)
    process = any_node.start(
        "--publish", f"{web}:80", "--publish", f"{other}:81", "--root", "python3", "-um",
        "http.server", "80",
    )
    assert b"Serving HTTP" in process.stdout.readline()

    fetched = subprocess.run(
        ["curl", "-sS", f"http://127.0.0.1:{web}/"], capture_output=True, timeout=DEADLINE_S
    )
    assert fetched.stdout.decode() == NONCE, fetched.stderr

    process.terminate()
    assert any_node.finish(process)[0] == 143


def test_a_port_that_cannot_be_had_is_refused_before_the_boot(kernel, image):
    require(shutil.which("slirp4netns"), "no slirp4netns")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(
        type=socket.SOCK_DGRAM
    ) as other:
        other.bind(("127.0.0.1", 0))
        taken, taken_udp, free = server.getsockname()[1], other.getsockname()[1], free_port()
        cases = [
            ([f"{taken}:80"], "in use", f"127.0.0.1:{taken}/tcp"),
            ([f"{taken_udp}:80/udp"], "in use", f"127.0.0.1:{taken_udp}/udp"),
            ([f"{free}:80", f"{free}:81"], "in use", f":{free}/"),
            ([f"192.0.2.99:{free}:80"], "annot assign", "192.0.2.99"),
            ([f"[::1]:{free}:80"], "IPv4", "[::1]"),
            (["1:80"], "ermission", "127.0.0.1:1/"),
        ]
        for node in make_node(kernel, image, UNPRIVILEGED if os.getuid() == 0 else os.getuid()):
            for publish, *words in cases:
                result = node.run(
                    *(word for text in publish for word in ("--publish", text)), "true"
                )
                assert result.returncode == 125 and result.stdout == b""
                assert_error(result, *words)


def test_ports_are_not_published_without_slirp4netns(node, helper):
    result = node.run("--publish", "8080:80", "true", env=NOWHERE)
    assert result.returncode == 125
    assert_error(result, "no network helper")
    if helper == "slirp":
        result = node.run("--publish", "8080:80", "--slirp", shutil.which("slirp"), "true")
        assert result.returncode == 125
        assert_error(result, "slirp, which would publish")


@pytest.mark.parametrize(
    "text, port",
    [
        ("8080:80", Port("tcp", "127.0.0.1", 8080, 80)),
        ("1:65535/udp", Port("udp", "127.0.0.1", 1, 65535)),
        ("0.0.0.0:53:53/udp", Port("udp", "0.0.0.0", 53, 53)),
        ("10.1.2.3:9:9/tcp", Port("tcp", "10.1.2.3", 9, 9)),
    ],
)
def test_ports_are_written_as_docker_s_users_know(text, port):
    assert parse_port(text) == port


@given(
    st.one_of(
        st.text(),
        st.from_regex(r"([0-9.:\[\]a]{0,9}:)?[0-9]{0,6}:[0-9]{0,6}(/[a-z]*)?", fullmatch=True),
    )
)
def test_what_is_no_port_is_refused(text):
    try:
        port = parse_port(text)
    except Fatal:
        return

    assert (
        apppot_start.parse_ipv4(port.host)
        and 0 < port.host_port < 65536
        and 0 < port.guest_port < 65536
    )


# --- A LAN between guests -------------------------------------------------------------------------


@pytest.fixture
def lan():
    """A wrap that runs runs in one network namespace, where multicast stays on the loopback."""
    setup = "ip link set lo up; ip route add 224.0.0.0/4 dev lo; echo ready; exec cat"
    with subprocess.Popen(
        ["unshare", "-n", "sh", "-ec", setup], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"ready\n"
        yield ("nsenter", "-t", str(holder.pid), "-n")
        holder.stdin.close()


@pytest.fixture
def lan_node(node, kernel):
    skip_unless(kernel_has(kernel, "CONFIG_UML_NET_MCAST"), "this kernel has no multicast network")
    return node


def group():
    return "239.255.{}.{}:{}".format(
        *os.urandom(2), 1024 + int.from_bytes(os.urandom(2), "big") % 60000
    )


@needs_root
def test_two_guests_of_a_lan_reach_each_other_by_addresses_of_their_own(lan_node, lan):
    serve = SERVE.format("SOCK_STREAM", 8000, NONCE, NONCE).replace(
        "'ready'", "'$APPPOT_LAN_ADDRESS'"
    )
    serve = f'python3 -c "{serve}"'
    job = {"SLURM_JOB_ID": NONCE}
    server = lan_node.start("--lan", "sh", "-c", serve, wrap=lan, env=job)

    address = server.stdout.readline().decode().strip()
    assert address.startswith("100.") and apppot_start.parse_ipv4(address)

    talk = (
        f"import socket; s = socket.create_connection(('{address}', 8000), 20); s.sendall(b'!'); "
        "print(s.recv(99))"
    )
    look = f'hostname; echo "$APPPOT_LAN_ADDRESS"; sudo -n hostname; python3 -c "{talk}"'
    other = lan_node.start("--lan", "sh", "-c", look, wrap=lan, env=job)
    status, stdout, stderr = lan_node.finish(other)

    *names, said = stdout.decode().split()
    assert (status, stderr, said) == (0, b"", f"b'{NONCE}!'"), stdout
    assert len(set(names)) == 1 and apppot_start.parse_ipv4(names[0]) and names[0] != address
    assert lan_node.finish(server)[0] == 0


@needs_root
def test_guests_of_other_groups_do_not_meet(lan_node, lan):
    serve = SERVE.format("SOCK_STREAM", 8000, NONCE, NONCE)
    server = lan_node.start(
        "--lan", group(), "--lan-address", "10.9.0.1", "python3", "-c", serve, wrap=lan
    )
    assert server.stdout.readline() == b"ready\n"

    talk = "curl -sS -m 3 http://10.9.0.1:8000/ || echo none"
    other = lan_node.start(
        "--lan=" + group(), "--lan-address", "10.9.0.2/24", "sh", "-c", talk, wrap=lan
    )
    assert lan_node.finish(other)[1] == b"none\n"

    server.terminate()
    assert lan_node.finish(server)[0] == 143


@needs_root
def test_a_host_without_multicast_is_told_before_the_boot(lan_node):
    process = lan_node.start("--lan", group(), "true", wrap=("unshare", "-n"))
    status, _, stderr = lan_node.finish(process)
    assert status == 125
    assert_told(stderr, "--lan", "239.255.")


@pytest.fixture(scope="session")
def mpi_image():
    path = TOP / "build" / "mpi.img"
    require(path.exists(), f"no image {path}: make mpi-image")
    return path


# What ssh is for: run a command in the other appliance, here the one that listens there.
AGENT = """#!/usr/bin/env python3
import os, socket, sys
if len(sys.argv) == 1:
    server = socket.create_server((os.environ["APPPOT_LAN_ADDRESS"], 7777))
    print("ready", flush=True)
    connection = server.accept()[0]
    command = connection.makefile().readline().replace("--daemonize", "")
    for number in (1, 2):
        os.dup2(connection.fileno(), number)
    os.execvp("sh", ["sh", "-c", command])
with socket.create_connection((sys.argv[1], 7777)) as connection:
    connection.sendall(" ".join(sys.argv[2:]).encode() + b"\\n")
    while connection.recv(65536):
        pass
"""
PROGRAM = """
import socket
from mpi4py import MPI
world = MPI.COMM_WORLD
payload = bytes([world.rank]) * (4 << 20)
right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
received = world.sendrecv(payload, dest=right, source=left)
assert received == bytes([left]) * (4 << 20)
total = world.allreduce(world.rank + 1)
names = world.gather(socket.gethostname())
if world.rank == 0:
    print(total, *sorted(set(names)))
"""


@needs_root
def test_a_real_mpi_program_runs_across_two_appliances(lan_node, lan, mpi_image):
    (lan_node.job / "agent").write_text(AGENT)
    (lan_node.job / "agent").chmod(0o755)
    (lan_node.job / "program.py").write_text(PROGRAM)
    options = ("--net", "none", "--lan", group(), "--lan-address")
    member = lan_node.start(*options, "10.9.0.2", "./agent", wrap=lan, image=mpi_image)
    assert member.stdout.readline() == b"ready\n", member.stderr.read()

    command = (
        "mpirun --allow-run-as-root --mca plm_rsh_agent $PWD/agent --host 10.9.0.1:1,10.9.0.2:1 "
        "-np 2 "
        "python3 program.py"
    )
    first = lan_node.start(*options, "10.9.0.1", "sh", "-c", command, wrap=lan, image=mpi_image)

    status, stdout, stderr = lan_node.finish(first)
    assert (status, stdout) == (0, b"3 10.9.0.1 10.9.0.2\n"), stderr
    assert lan_node.finish(member)[0] == 0


def test_lan_takes_a_group_and_no_command():
    split = apppot_start.build_parser().split
    assert split(["--lan", "ls"]) == (["--lan"], ("ls",))
    assert split(["--lan", "239.1.2.3:5000", "ls"]) == (["--lan", "239.1.2.3:5000"], ("ls",))
    assert split(["--lan", "239.1.2.3:500000", "ls"])[1] == ("ls",), "a wrong group is no command"
    assert split(["--lan=239.1.2.3:5000", "ls"]) == (["--lan=239.1.2.3:5000"], ("ls",))
    assert split(["--lan", "--mem", "1G", "ls"]) == (["--lan", "--mem", "1G"], ("ls",))
    assert split(["--lan"]) == (["--lan"], ())
    assert (
        apppot_start.build_parser().parse_args(["--lan", "239.1.2.3:5000"]).lan == "239.1.2.3:5000"
    )


def test_the_lan_of_a_batch_job_is_its_own_and_addresses_are_unique():
    first, other = parse_lan("", "", "7"), parse_lan("", "", "7")
    assert (first.group, first.port) == (other.group, other.port) and first.address != other.address
    assert (first.group, first.port) != (parse_lan("", "", "8").group, parse_lan("", "", "8").port)
    assert parse_lan("239.1.2.3:5000", "10.1.1.1", "") == Lan("10.1.1.1", 16, "239.1.2.3", 5000)
    assert parse_lan("239.1.2.3:5000", "10.1.1.1/24", "").prefix == 24


@pytest.mark.parametrize(
    "where, address",
    [
        ("10.1.2.3:5000", ""), ("239.1.2.3", ""), ("239.1.2.3:0", ""), ("239.1.2.3:70000", ""),
        ("239.1.2.3:500000", ""),
        ("239.1.2.300:5", ""), ("x", ""), ("", "10.1.1"), ("", "fe80::1"), ("", "10.1.1.1/31"),
        ("", "10.1.1.1/"), ("", "10.1.1.1/x"),
    ],
)
def test_what_is_no_lan_is_refused(where, address):
    with pytest.raises(Fatal):
        parse_lan(where, address, "")


@given(st.ip_addresses(v=4), st.integers(8, 30))
def test_the_agent_reads_addresses_and_netmasks_as_the_runner_writes_them(address, prefix):
    interface = apppot_init.parse_interface(b"eth1", f"{address}/{prefix}".encode())
    assert interface.address == address.packed
    assert format(int.from_bytes(interface.netmask, "big"), "032b") == "1" * prefix + "0" * (
        32 - prefix
    )
