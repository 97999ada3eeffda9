# SPDX-License-Identifier: Apache-2.0
"""A run is like a process of the node.

That is true of its streams, numbers, names, account and signals, and of what it knows of the node.
"""

import os
import re
import shlex
import signal
import socket
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodes import DEADLINE_S, UNPRIVILEGED, Node, change_image, mounted, needs_root, writable_copy
from test_init import make_job

import apppot_init
import apppot_start

NONCE = os.urandom(8).hex()


def run_guest(node, script, *options, **more):
    """The output of a shell script in the guest, which has to say nothing else and end with 0."""
    result = node.run(*options, "bash", "-c", script, **more)
    assert (result.returncode, result.stderr) == (0, b""), result
    return result.stdout.decode()


# --- Streams --------------------------------------------------------------------------------------

STREAMS = """
echo a > /dev/stderr; echo b >> /dev/stderr; echo c | tee /dev/stderr > /dev/null
echo d > /dev/stdout; echo e >> /proc/self/fd/1; echo f > /dev/fd/2
head -c 6 /dev/stdin; cat < /proc/self/fd/0; cat /dev/stdin
: > /dev/stdin; cat
sudo -n sh -c 'echo g > /dev/stderr; echo h > /dev/stdout; cat /dev/stdin'
"""


@pytest.mark.own_kernel
@pytest.mark.parametrize("kind", ["pipe", "file", "null", "closed"])
def test_standard_streams_can_be_opened_by_their_names(any_node, kind):
    given = {"pipe": b"input\nand more\n", "file": b"input\nand more\n"}.get(kind, b"")
    (any_node.job / "in").write_bytes(given)
    redirections = {"pipe": "cat in |", "file": "< in", "null": "< /dev/null", "closed": "<&-"}
    wrap = (
        "bash", "-c",
        f'{redirections[kind]} "$@"' if kind == "pipe" else f'"$@" {redirections[kind]}', "-",
    )

    result = any_node.run("bash", "-c", STREAMS, wrap=wrap)
    assert (result.stdout, result.stderr) == (b"d\ne\n" + given + b"h\n", b"a\nb\nc\nf\ng\n")


def test_standard_streams_of_one_pipe_and_of_root_can_be_opened_too(any_node):
    process = any_node.start("bash", "-c", STREAMS, stderr=subprocess.STDOUT)
    assert any_node.finish(process)[:2] == (0, b"a\nb\nc\nd\ne\nf\ng\nh\n")
    result = any_node.run("--root", "bash", "-c", STREAMS, input=b"input\n")
    assert (result.stdout, result.stderr) == (b"d\ne\ninput\nh\n", b"a\nb\nc\nf\ng\n")


def test_standard_streams_of_a_terminal_can_be_opened(any_node):
    script = (
        "echo a > /dev/tty; echo b > /dev/stderr; echo c >> /dev/stdout; tty < /dev/stdin; "
        "head -n 1 /dev/stdin"
    )
    result = any_node.run("-t", "bash", "-c", script, input=b"typed\n")
    assert re.search(rb"a\r\nb\r\nc\r\n/dev/pts/\d+\r\n(.*\r\n)*typed\r\n", result.stdout), result


def test_a_stream_that_was_opened_again_ends_as_the_first_one_does(node):
    process = node.start_ready("exec 3> /dev/stdout; yes >&3")
    process.stdout.close()
    assert process.wait(DEADLINE_S) == 141

    writer = subprocess.Popen(["yes"], stdout=subprocess.PIPE)
    script = "exec 3< /dev/stdin; exec <&- 3<&-; until [ -e gone ]; do sleep 0.1; done; echo seen"
    process = node.start("bash", "-c", script, stdin=writer.stdout)
    writer.stdout.close()
    assert writer.wait(DEADLINE_S) == -signal.SIGPIPE

    (node.job / "gone").touch()
    assert node.finish(process) == (0, b"seen\n", b"")


# --- Process numbers, scheduling, the process group -----------------------------------------------


def test_process_numbers_differ_from_run_to_run(any_node):
    numbers = [
        run_guest(any_node, 'echo $$; bash -c "echo \\$\\$; true"').split() for _ in range(3)
    ]
    assert len({first for first, _ in numbers}) == 3
    # Debian's kernel begins at one of 256 places.
    assert len({second for _, second in numbers}) > 1


CLONES = """
import os, sys
sys.path.insert(0, '/usr/lib/apppot')
import apppot_init

def look():
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid, len(os.listdir('/proc')), sorted(os.listdir('/proc/self/fd'))

before = look()
for _ in range(5000):
    apppot_init.use_up_number()
after = look()
moved = (after[0] - before[0]) % (apppot_init.PID_MAX - 300)
assert 5001 <= moved < 5100, (before, after)
assert abs(after[1] - before[1]) < 5 and before[2] == after[2], (before, after)
pid = apppot_init.fork_as(3999999)
if not pid:
    os._exit(7)
assert pid == 3999999 and os.waitpid(pid, 0)[1] == 7 << 8
print('as it was')
"""


def test_using_up_process_numbers_leaves_nothing(node):
    assert run_guest(node, f"python3 -IS -c {shlex.quote(CLONES)}", "--root") == "as it was\n"


SCHEDULING = """
import os
agent = os.SCHED_BATCH | os.SCHED_RESET_ON_FORK
policies = [os.sched_getscheduler(pid) for pid in (0, os.getppid(), 1)]
assert policies == [os.SCHED_OTHER, os.SCHED_OTHER, agent]
for policy in (None, os.SCHED_OTHER):
    scheduler = (policy, os.sched_param(0))
    pid = os.posix_spawn('/bin/echo', ['echo', 'spawned'], {}, scheduler=scheduler)
    assert os.waitpid(pid, 0)[1] == 0
"""


def test_only_the_agent_is_scheduled_as_a_batch_process(any_node):
    for options in ((), ("-t",)):
        result = any_node.run(
            *options, "bash", "-c", f"python3 -c {shlex.quote(SCHEDULING)}; exit $?"
        )
        assert result.returncode == 0 and result.stdout.split() == [b"spawned"] * 2, result


def test_setsid_becomes_the_command_that_it_starts(any_node):
    result = any_node.run("setsid", "bash", "-c", "sleep 0.2; echo $PPID; echo err >&2; exit 7")
    assert (result.returncode, result.stdout, result.stderr) == (7, b"1\n", b"err\n")

    script = "trap 'echo told; exit 4' TERM; echo ready; while :; do sleep 0.1; done"
    process = any_node.start("setsid", "bash", "-c", script)
    assert process.stdout.readline() == b"ready\n"

    process.terminate()
    assert any_node.finish(process)[:2] == (4, b"told\n")
    assert any_node.run("setsid", "no-such-command").returncode == 127


def test_the_command_leads_a_process_group_in_a_terminal_only(any_node):
    script = (
        "import os; print(os.getpid() == os.getpgrp(), os.getpgrp() == os.getsid(0), os.getppid())"
    )
    assert any_node.run("python3", "-c", script).stdout == b"False True 1\n"
    assert any_node.run("-t", "python3", "-c", script).stdout.startswith(b"True False ")


@pytest.mark.own_kernel
@pytest.mark.parametrize("end, status", [("exit 3", 3), ("kill -9 $$", 137)])
def test_a_command_that_ends_at_once_is_waited_for(any_node, end, status):
    assert any_node.run("sh", "-c", end).returncode == status


# --- Signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", ["PIPE", "PIPE XFSZ HUP", "USR1 WINCH CHLD RTMIN+3 ALRM", ""])
def test_the_command_ignores_what_its_caller_ignores(any_node, ignored):
    """As the same shell's other child does."""
    script = f'trap "" {ignored or "0"}; grep SigIgn /proc/self/status; "$@"; exit $?'
    process = any_node.start(
        "grep", "SigIgn", "/proc/self/status", wrap=("bash", "-c", script, "-")
    )
    status, stdout, stderr = any_node.finish(process)

    # 32 and 33 are the C library's own, which nobody can set: make's children ignore them.
    here, there = (int(line.split()[1], 16) & ~(3 << 31) for line in stdout.splitlines())
    assert (status, stderr, there) == (0, b"", here) and (here != 0) == bool(ignored)


# --- Names ----------------------------------------------------------------------------------------

NAMES = """
hostname; hostname -f; getent hosts "$(hostname)"; sudo -n true; cat /proc/sys/kernel/hostname
[ -e /sys/fs/cgroup/cgroup.procs ] && echo groups
"""


def test_the_host_name_tells_the_run_and_resolves(any_node):
    runs = [run_guest(any_node, NAMES, env={"SLURM_JOB_ID": "4711"}).split() for _ in range(2)]
    node = socket.gethostname().partition(".")[0]
    for name, long_name, address, *names, again, groups in runs:
        assert re.fullmatch(re.escape(node) + "-4711-[0-9a-f]{6}", name)
        assert name == again == long_name.partition(".")[0] and name in names
        assert address == "127.0.1.1" and groups == "groups"
    assert runs[0][0] != runs[1][0]


@given(st.text(max_size=90), st.text(max_size=30), st.sampled_from(["", "example.org"]))
def test_a_host_name_is_one_whatever_the_node_is_called(node, job_id, domain):
    told = apppot_start.name_guest(f"{node}.{domain}" if domain else node, job_id, "a1b2c3").split()
    assert (
        re.fullmatch("[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?-a1b2c3", told[-1])
        and len(told[-1]) <= 63
    )
    assert told[-1] != node and len(told) <= 2


@pytest.mark.parametrize(
    "node, job_id, expected",
    [
        ("n7", "", "n7-x"), ("n7.a.example", "", "n7-x.a.example n7-x"),
        ("n7", "12[3].server", "n7-12-3-x"), ("", "", "apppot-x"), ("(none)", "9", "none-9-x"),
        ("a_b", "", "a-b-x"), ("n" * 70, "", "n" * 61 + "-x"),
    ],
)
def test_a_host_name_has_the_node_s_and_the_job_s(node, job_id, expected):
    assert apppot_start.name_guest(node, job_id, "x") == expected


# --- The node's files -----------------------------------------------------------------------------

HOSTS = f"""127.0.0.1 localhost
127.0.1.1 node
::1 localhost ip6
# 10.9.9.8 commented
10.9.9.9\tlicence-{NONCE} lic  # and why
  fd00::9 six-{NONCE}
"""
RESOLVER = (
    "# a comment\nnameserver 127.0.0.53\nsearch a.example b.example\noptions ndots:2 trust-ad\n"
)


def node_with(node, hosts=HOSTS, resolver=RESOLVER, zone="Asia/Tokyo"):
    """A wrap that makes this machine such a node."""
    (node.root / "hosts").write_text(hosts)
    (node.root / "resolver").write_text(resolver)
    return mounted(
        f"mount --bind {node.root}/hosts /etc/hosts; "
        f"mount --bind {node.root}/resolver /etc/resolv.conf; "
        f"mount --bind /usr/share/zoneinfo/{zone} /etc/localtime"
    )


def test_of_the_node_s_files_goes_in_what_is_true_in_the_guest():
    lines = f"10.9.9.9\tlicence-{NONCE} lic\nfd00::9 six-{NONCE}\n".encode()
    assert apppot_start.select_hosts(HOSTS.encode()) == lines

    expected = b"search a.example b.example\noptions ndots:2 trust-ad\n"
    assert apppot_start.select_resolver(RESOLVER.encode(), "node.c.example") == expected
    assert (
        apppot_start.select_resolver(b"nameserver 1.2.3.4", "node.c.example")
        == b"search c.example\n"
    )
    assert apppot_start.select_resolver(b"domain d\n", "node.c.example") == b"domain d\n"
    assert apppot_start.select_resolver(b"", "node") == b""


def test_a_file_of_the_node_that_is_too_large_is_left_out_and_told(tmp_path):
    notes = []
    (tmp_path / "hosts").write_bytes(b"10.0.0.1 a\n" * 100000)
    assert (
        len(apppot_start.select_hosts(apppot_start.read_short(str(tmp_path / "hosts"), notes)))
        == 1100000
    )

    with open(tmp_path / "hosts", "ab") as file:
        file.truncate(5 << 20)
    assert (
        apppot_start.read_short(str(tmp_path / "hosts"), notes) == b""
        and str(tmp_path / "hosts") in notes[0]
    )
    assert apppot_start.read_short(str(tmp_path / "none"), notes) == b"" and len(notes) == 1


@given(st.binary(), st.binary(), st.binary(max_size=50))
def test_the_guest_is_told_of_the_node_s_files_byte_by_byte(hosts, resolver, zone):
    view = apppot_start.NodeView(
        b"x", apppot_start.select_hosts(hosts), apppot_start.select_resolver(resolver, "n"), zone
    )
    node = make_job(node=view).node
    names = ("host_names", "hosts", "resolver", "zone", "zone_name", "certificates")
    assert tuple(getattr(node, name) for name in names) == tuple(view)


@needs_root
@pytest.mark.parametrize("options", [(), ("--root", "--clean-env", "--net", "none")])
def test_the_guest_has_the_node_s_zone_search_list_and_names(node, options):
    script = (
        "date +%Z; sudo -n date +%Z; readlink /etc/localtime; getent hosts lic; "
        "cat /etc/resolv.conf /etc/hosts"
    )
    lines = run_guest(node, script, *options, wrap=node_with(node)).splitlines()

    assert lines[:2] == ["JST", "JST"] and "zoneinfo/" in lines[2]
    assert lines[3].split() == ["10.9.9.9", f"licence-{NONCE}", "lic"]
    assert lines[4:7] == [
        "nameserver 10.0.2.3", "search a.example b.example", "options ndots:2 trust-ad",
    ]
    assert "127.0.0.1 localhost apppot" in lines and not any("commented" in line for line in lines)
    assert "127.0.1.1 node" not in lines


EDIT = f"echo 10.7.7.7 own-{NONCE} >> /etc/hosts; echo options rotate >> /etc/resolv.conf"
SHOW = "cat /etc/hosts /etc/resolv.conf; readlink /etc/localtime; cat /etc/localtime | tail -n 1"


@pytest.mark.own_kernel
@needs_root
@pytest.mark.parametrize("edit", [":", EDIT])
def test_the_node_s_files_are_not_for_changes_files_but_an_edit_is(node, edit):
    changes = node.root / "changes.tar.gz"
    before = run_guest(node, SHOW, "--net", "none").splitlines()
    script = f"apppot-snap changes -n | grep -E '/etc/(hosts|resolv|localtime)'; {edit}"
    wrap = node_with(node)
    assert run_guest(node, script, "--root", "--save-changes", str(changes), wrap=wrap) == ""

    listed = (
        subprocess.run(["tar", "tzf", changes], check=True, capture_output=True)
        .stdout.decode()
        .split()
    )
    assert [name for name in listed if name.startswith("etc/") and name != "etc/"] == (
        ["etc/hosts", "etc/resolv.conf"] if edit == EDIT else []
    )

    after = run_guest(node, SHOW, "--net", "none", "--changes", str(changes)).splitlines()
    added = [f"10.7.7.7 own-{NONCE}", "options rotate"] if edit == EDIT else []
    is_own = re.compile(r"127\.0\.1\.1 ").match  # which differs from run to run
    assert sorted(filter(lambda line: not is_own(line), after)) == sorted(
        [*filter(lambda line: not is_own(line), before), *added]
    )


@pytest.mark.own_kernel
@needs_root
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_the_node_s_files_do_not_stay_in_an_image_but_an_edit_does(node, image, end):
    own = writable_copy(node, image)
    change_image(own, "rm /etc/localtime\nrm /etc/hosts\n")
    script = (
        f"date +%Z; getent hosts lic; {EDIT if end == 'exit' else 'sync'}; echo ready; read line; "
        "true"
    )
    wrap = node_with(node)

    process = node.start(
        "--write", "--root", "sh", "-c", script, image=own, stdin=subprocess.PIPE, wrap=wrap
    )
    assert [process.stdout.readline().split()[0] for _ in range(3)] == [
        b"JST", b"10.9.9.9", b"ready",
    ]

    if end == "kill":
        process.kill()
        node.wait_until_gone()
    assert (node.finish(process)[0] == 0) == (end == "exit")

    look = [subprocess.run(["/sbin/debugfs", "-R", f"cat /etc/{name}", own], capture_output=True).stdout
            for name in ("hosts", "resolv.conf", "localtime")]  # fmt: skip

    if end == "exit":
        assert look == [
            f"10.7.7.7 own-{NONCE}\n".encode(),
            b"nameserver 10.0.2.3\noptions rotate\n",
            b"",
        ]
    else:
        assert look == [b"", b"nameserver 10.0.2.3\n", b""]


# --- The account ----------------------------------------------------------------------------------


def passwd_node(kernel, image, name, uid):
    """A node on which the caller has such an account, and the wrap that makes it so."""
    node = Node(kernel, image, uid)
    node.become = lambda: None
    entry = b"%s:x:%d:%d::/:/bin/sh\n" % (os.fsencode(name), uid, uid)
    (node.root / "passwd").write_bytes(b"root:x:0:0::/root:/bin/sh\n" + entry)
    drop = f'exec setpriv --reuid={uid} --regid={uid} --clear-groups "$@"'
    return node, (
        "unshare", "-m", "sh", "-ec", f"mount --bind {node.root}/passwd /etc/passwd; {drop}", "-",
    )


CALLERS = [
    ("daemon", 1, "daemon"), ("ann", 33, "ann"), ("www-data", 4242, "www-data"),
    ("root", 4242, "u4242"), ("..", 4242, "u4242"),
    ("DOM\\a b@c.example", 4242, "DOM\\a b@c.example"), ("bin", 33, "bin"),
    (os.fsdecode(b"\xc3\xa9\xff$"), 4242, None),
]


@pytest.mark.own_kernel
@needs_root
@pytest.mark.parametrize("name, uid, shown", CALLERS)
def test_any_caller_has_an_account_and_a_home_and_the_appliance_s_stay(
    kernel, image, name, uid, shown
):
    node, wrap = passwd_node(kernel, image, name, uid)
    script = (
        'id -u; id -un; echo "$HOME"; touch ~/x ~/job/y && echo made; sudo -n id -un; '
        "stat -c %u /usr/sbin /var/www /home /root / /bin 2> /dev/null | sort -u; "
        "wc -l < /etc/passwd; "
        "getent passwd | cut -d: -f1,3"
    )

    try:
        plain = run_guest(
            node, "wc -l < /etc/passwd; getent passwd | cut -d: -f1,3", "--root", wrap=("env",)
        )
        result = node.run("bash", "-c", script, wrap=wrap)
        lines = os.fsdecode(result.stdout).splitlines()
        assert (result.returncode, result.stderr) == (0, b"")
        home = "/home/" + (shown or name)
        assert lines[:6] == [str(uid), shown or name, home, "made", "root", "0"]
        assert int(lines[6]) == int(plain.split()[0]) + 1
        assert [line for line in plain.splitlines()[1:] if line not in lines[7:]] == []
        assert (node.job / "y").stat().st_uid == uid
        node.assert_nothing_left()
    finally:
        node.close()


@pytest.mark.own_kernel
@needs_root
@pytest.mark.parametrize(
    "name, uid, added", [("daemon", 4242, []), ("ann", 33, []), ("ann", 4242, ["ann:4242"])]
)
def test_with_root_the_accounts_of_the_appliance_stay_as_they_are(kernel, image, name, uid, added):
    node, wrap = passwd_node(kernel, image, name, uid)
    script = "getent passwd | cut -d: -f1,3; stat -c %u /usr/sbin"

    try:
        plain = run_guest(node, script, "--root", wrap=("env",)).splitlines()
        assert run_guest(node, script, "--root", wrap=wrap).splitlines() == [
            *plain[:-1], *added, plain[-1],
        ]
        node.assert_nothing_left()
    finally:
        node.close()


@pytest.mark.parametrize(
    "home, usable",
    [
        ("/home/ann", True), ("/home/team/ann", True), ("/home", False), ("/usr/sbin", False),
        ("/", False), (".", False), ("/nonexistent", False),
    ],
)
def test_a_home_is_one_s_own_below_home_or_by_its_owner(tmp_path, home, usable):
    assert apppot_init.is_own_home(home.encode(), 4242) is usable
    assert apppot_init.is_own_home(os.fsencode(tmp_path), os.getuid())
    assert not apppot_init.is_own_home(os.fsencode(tmp_path), os.getuid() + 1)


def test_configuration_of_the_host_s_clients_does_not_go_in_unless_it_is_named():
    job = {
        b"SLURM_JOB_ID": b"1", b"SLURM_SUBMIT_DIR": b"/d", b"PBS_NODEFILE": b"/n",
        b"SLURM_CONFX": b"",
    }

    site = {
        b"SLURM_CONF": b"/etc/slurm.conf", b"PBS_CONF_FILE": b"/etc/pbs.conf", b"SGE_ROOT": b"/sge",
    }
    assert apppot_start.select_environment({**job, **site}, [], False) == job
    assert apppot_start.select_environment(site, ["SLURM_CONF"], True) == {
        b"SLURM_CONF": b"/etc/slurm.conf"
    }


def test_a_proxy_on_the_loopback_of_the_node_is_at_the_gateway_of_the_guest():
    given = {
        b"http_proxy": b"http://me:pw@localhost:3128/", b"HTTPS_PROXY": b"127.0.0.1:3128",
        b"all_proxy": b"socks5://[::1]:1", b"ftp_proxy": b"http://localhost.example:1",
        b"no_proxy": b"localhost,127.0.0.1", b"HOME": b"localhost",
    }
    assert apppot_start.redirect_proxies(given, "10.0.2.2") == {
        b"http_proxy": b"http://me:pw@10.0.2.2:3128/", b"HTTPS_PROXY": b"10.0.2.2:3128",
        b"all_proxy": b"socks5://10.0.2.2:1",
    }


CERTIFICATE = "-----BEGIN CERTIFICATE-----\nb3Vy\nb3du\n-----END CERTIFICATE-----\n"


def test_proxies_and_certificates_of_the_node_reach_the_command_and_sudo(any_node):
    (any_node.root / "site.pem").write_text("# Our Own CA\n" + CERTIFICATE)
    node = {"http_proxy": "http://proxy:3128", "NO_PROXY": "x", "SSL_CERT_FILE": str(any_node.root / "site.pem")}
    script = """
        show() { echo $http_proxy $NO_PROXY $(grep -c BEGIN $SSL_CERT_FILE) $(tail -n 3 $SSL_CERT_FILE); }
        show
        export -f show
        sudo bash -c "$(declare -f show); show"
        apt-config dump Acquire::https::CaInfo
        tail -n 1 /etc/ssl/certs/ca-certificates.crt"""
    lines = run_guest(any_node, script, env=node).splitlines()
    shown = f"http://proxy:3128 x [0-9]{{3}} {' '.join(CERTIFICATE.splitlines()[1:])}"
    assert re.fullmatch(shown, lines[0]) and lines[1] == lines[0]
    assert lines[2].endswith('/ca-certificates.crt";') and "b3du" not in lines[3]

    clean = run_guest(any_node, "env | grep -c -E 'proxy|PROXY|SSL|APT'; true", "--clean-env", env=node)
    assert clean == "0\n"


# --- ~/job ----------------------------------------------------------------------------------------


@pytest.mark.own_kernel
@needs_root
@pytest.mark.parametrize("kind", ["below", "itself", "linked"])
def test_the_link_job_in_the_home_leads_to_a_job_directory_below_its_own_path(kernel, image, kind):
    node, _ = passwd_node(kernel, image, "nobody", UNPRIVILEGED)
    prepare = {
        "below": "mkdir -p /home/nobody/job/sub/dir",
        "itself": "mkdir -p /home/nobody/job",
        "linked": "mkdir -p /home/nobody /home/data/sub/dir; ln -s /home/data /home/nobody/job",
    }[kind]
    here = "/home/nobody/job" + ("" if kind == "itself" else "/sub/dir")
    place = (
        f"mount -t tmpfs -o mode=755 none /home; {prepare}; chown -R {node.uid}:{node.uid} /home; "
        f"cd {here}"
    )
    look = '"$@"; status=$?; ls -A /home/*; ls -A; exit $status'
    drop = (
        f"exec setpriv --reuid={node.uid} --regid={node.uid} --clear-groups sh -c "
        f"{shlex.quote(look)}"
    )
    wrap = ("unshare", "-m", "bash", "-ec", f'{place}; {drop} - "$@"', "-")

    try:
        script = (
            "pwd; cd ~/job && touch in-it && cd - > /dev/null && ls; touch ~/own; "
            "[ -O ~/own ] && echo own; pwd"
        )
        status, stdout, stderr = node.finish(node.start("bash", "-c", script, wrap=wrap))
        names = ["/home/data:", "sub", "", "/home/nobody:", "job"] if kind == "linked" else ["job"]
        assert (status, stderr) == (0, b"")
        assert stdout.decode().splitlines() == [here, "in-it", "own", here, *names, "in-it"]
        node.assert_nothing_left()
    finally:
        node.close()


def test_an_empty_number_of_threads_is_none_that_the_caller_set():
    one = {b"OMP_NUM_THREADS": b"1", b"OPENBLAS_NUM_THREADS": b"1", b"MKL_NUM_THREADS": b"1"}
    assert apppot_start.limit_threads({b"OMP_NUM_THREADS": b"", b"MKL_NUM_THREADS": b""}) == one
    assert apppot_start.limit_threads({b"OMP_NUM_THREADS": b"2", b"MKL_NUM_THREADS": b""}) == {}
    assert b"MKL_NUM_THREADS" not in apppot_start.limit_threads(
        {b"OMP_NUM_THREADS": b"", b"MKL_NUM_THREADS": b"2"}
    )
