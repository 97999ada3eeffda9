# SPDX-License-Identifier: Apache-2.0
"""What a command sees and its caller gets: status, streams, arguments, files, identity."""

import hashlib
import os
import pty
import pwd
import re
import shutil
import socket
import subprocess
import threading

import pytest
from nodes import (
    DEADLINE_S,
    assert_error,
    both_carriers,
    needs_root,
    replace_agent,
    wait_for,
    writable_copy,
    write_into,
)

NONCE = os.urandom(8).hex()


def test_only_the_command_s_output_appears_and_v_shows_the_boot(any_node):
    result = any_node.run("uname", "-a")
    assert result.returncode == 0 and result.stderr == b""
    assert re.fullmatch(rb"Linux [A-Za-z0-9-]+ \d+\.\d+\.\d+[^\n]*\n", result.stdout)
    verbose = any_node.run("-v", "echo", NONCE)
    assert verbose.stdout == NONCE.encode() + b"\n" and b"Linux version" in verbose.stderr


@pytest.mark.own_kernel
@pytest.mark.parametrize("status", [0, 1, 2, 7, 124, 125, 126, 127, 128, 200, 255])
def test_exit_status_comes_back(node, status):
    assert node.run("sh", "-c", f"exit {status}").returncode == status


@pytest.mark.parametrize("number", [1, 2, 6, 9, 11, 15, 24])
def test_death_by_a_signal_is_128_and_its_number(node, number):
    result = node.run("bash", "-c", f"kill -{number} $$; sleep 60")
    assert (result.returncode, result.stderr) == (128 + number, b"")


@pytest.mark.parametrize("number", [1, 9, 11, 32, 40])
def test_in_a_batch_job_the_runner_dies_of_the_signal_that_killed_the_command(node, number):
    cores = ("bash", "-c", 'ulimit -c unlimited; exec "$@"', "-")
    result = node.run(
        "bash", "-c", f"kill -{number} $$; sleep 60", wrap=cores, env={"SLURM_JOB_ID": "1"}
    )

    # What the C library keeps for itself is told as a shell tells all of them.
    assert (result.returncode, result.stderr) == (160 if number == 32 else -number, b"")
    # The core is the command's: the limit for it goes in.
    assert os.listdir(node.job) == (["core"] if number == 11 else [])
    assert number != 11 or b"apppot_start" not in (node.job / "core").read_bytes()


def test_commands_that_cannot_run_end_as_in_a_shell(any_node):
    (any_node.job / "plain").write_text("echo from a script without a first line $1\n")
    (any_node.job / "plain").chmod(0o755)
    (any_node.job / "bad").write_text("#!/no/such/interpreter\n")
    (any_node.job / "bad").chmod(0o755)
    expected = {
        "no-such": 127, "./no-such": 127, "/etc/passwd": 126, "/etc": 126, "": 127, "./bad": 127,
    }

    for command, status in expected.items():
        result = any_node.run(command)
        assert result.returncode == status and result.stdout == b"", command
        assert_error(result, command)

    result = any_node.run("./plain", NONCE)
    assert result.stdout == f"from a script without a first line {NONCE}\n".encode()


# --- Streams --------------------------------------------------------------------------------------


def digest_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@both_carriers
def test_stdout_and_stderr_are_byte_exact_at_once(any_node):
    for name in ("a", "b"):
        with open(any_node.job / name, "wb") as file:
            for _ in range(256):
                file.write(os.urandom(1 << 20))

    with open(any_node.job / "out", "wb") as out:
        process = any_node.start("sh", "-c", "cat a & cat b >&2; wait", stdout=out)
        stderr = hashlib.sha256()
        while True:
            piece = process.stderr.read(1 << 20)
            if not piece:
                break
            stderr.update(piece)

    assert process.wait(DEADLINE_S) == 0
    assert digest_of(any_node.job / "out") == digest_of(any_node.job / "a")
    assert stderr.hexdigest() == digest_of(any_node.job / "b")


@pytest.mark.own_kernel
@both_carriers
def test_a_gibibyte_of_stdin_arrives(node):
    process = node.start("sh", "-c", "cat | sha256sum", stdin=subprocess.PIPE)
    digest = hashlib.sha256()

    for number in range(1024):
        piece = os.urandom(1 << 10) * 1023 + number.to_bytes(1024, "big")
        digest.update(piece)
        process.stdin.write(piece)

    process.stdin.close()
    assert process.stdout.read().split()[0].decode() == digest.hexdigest()
    assert process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize(
    "kind", ["pipe", "file", "here-document", "null", "closed", "socket", "terminal"]
)
def test_stdin_of_every_kind_has_its_bytes_and_its_end(node, kind):
    content = {
        "null": b"",
        "closed": b"",
        "terminal": b"a line typed\nand another\n",
        "here-document": b"a line of text\n" * 7000,
    }.get(kind, b"some\x00bytes\xff and\nlines\n" * 9999)
    assert run_with_stdin(node, kind, content) == (0, content + b"end\n", b"")


def run_with_stdin(node, kind, content):  # noqa: PLR0911
    words = ("sh", "-c", "cat; echo end")
    if kind == "pipe":
        process = node.run(*words, input=content)
        return process.returncode, process.stdout, process.stderr

    if kind == "file":
        (node.job / "input").write_bytes(content)
        with open(node.job / "input", "rb") as file:
            return node.finish(node.start(*words, stdin=file))

    if kind == "here-document":  # bash passes it as an unlinked file; shell text, so no odd bytes
        script = "exec \"$@\" <<'END'\n" + content.decode() + "END\n"
        return node.finish(node.start(*words, wrap=("bash", "-c", script, "-")))

    if kind == "null":
        return node.finish(node.start(*words, stdin=subprocess.DEVNULL))
    if kind == "closed":
        return node.finish(node.start(*words, wrap=("bash", "-c", 'exec "$@" <&-', "-")))

    if kind == "socket":
        ours, theirs = socket.socketpair()
        process = node.start(*words, stdin=theirs)
        theirs.close()
        threading.Thread(target=lambda: (ours.sendall(content), ours.close())).start()
        return node.finish(process)

    leader, follower = pty.openpty()
    process = node.start(*words, stdin=follower)
    os.close(follower)
    os.write(leader, content + b"\x04")
    result = node.finish(process)
    os.close(leader)
    return result


def test_a_command_that_never_reads_leaves_its_input_where_it_was(node):
    with open("/dev/zero", "rb") as zeros:
        assert node.finish(node.start("true", stdin=zeros)) == (0, b"", b"")
    (node.job / "lines").write_text("one\ntwo\nthree\n")

    loop = 'while read -r line; do "$@"; echo "got $line"; done < lines'
    assert node.finish(node.start("true", wrap=("bash", "-c", loop, "-"))) == (
        0, b"got one\ngot two\ngot three\n", b"",
    )


@pytest.mark.own_kernel
@pytest.mark.parametrize(
    "script, lines_read",
    [("cat", None), ("sleep 1; cat", None), ("read a", 1), ("read a; exec <&-", 1)],
)
@pytest.mark.parametrize("lines", [3, 200000])
def test_a_command_leaves_a_file_where_it_stopped_reading(node, script, lines_read, lines):
    """So that the next reader of the caller's script neither misses a line nor sees one again."""
    content = [f"line {number}\n" for number in range(lines)]
    (node.job / "lines").write_text("".join(content))
    rest = "" if lines_read is None else "".join(content[lines_read:])
    wrap = ("bash", "-c", '{ "$@" > /dev/null; cat; } < lines', "-")
    assert node.finish(node.start("sh", "-c", script, wrap=wrap)) == (0, rest.encode(), b"")


def test_a_caller_that_closes_stdout_ends_the_command_with_sigpipe(node):
    process = node.start("yes")
    assert process.stdout.read(2) == b"y\n"
    process.stdout.close()
    assert process.wait(DEADLINE_S) == 141 and process.stderr.read() == b""


def test_a_command_that_closes_stdin_ends_its_writer_with_sigpipe(node):
    writer = subprocess.Popen(["yes"], stdout=subprocess.PIPE)
    process = node.start(
        "sh", "-c", "exec <&-; while [ ! -e ../job/gone ]; do sleep 0.1; done; echo seen",
        stdin=writer.stdout,
    )

    writer.stdout.close()
    assert writer.wait(DEADLINE_S) == -13

    (node.job / "gone").touch()
    assert node.finish(process) == (0, b"seen\n", b"")


def test_the_caller_s_descriptors_stay_blocking(node):
    (reader, writer), (ours, theirs) = os.pipe(), socket.socketpair()
    process = node.start("sh", "-c", "cat; echo ready; cat", stdin=theirs, stdout=writer)
    ours.shutdown(socket.SHUT_WR)
    assert os.read(reader, 6) == b"ready\n"
    assert os.get_blocking(writer) and os.get_blocking(theirs.fileno())
    assert process.wait(DEADLINE_S) == 0

    for descriptor in (reader, writer):
        os.close(descriptor)
    ours.close(), theirs.close()


def test_one_file_for_both_outputs_keeps_their_order(node):
    script = "for i in $(seq 300); do echo out $i; echo err $i >&2; done"
    _, stdout, _ = node.finish(node.start("bash", "-c", script, stderr=subprocess.STDOUT))
    assert stdout.decode().split("\n")[:-1] == [
        f"{name} {i}" for i in range(1, 301) for name in ("out", "err")
    ]


def test_a_blocked_stdout_does_not_hold_stderr_back(node):
    process = node.start(
        "sh",
        "-c",
        "head -c 30000000 /dev/zero & while [ ! -e go ]; do sleep 0.1; done; echo free >&2; wait",
    )

    (node.job / "go").touch()
    assert process.stderr.readline() == b"free\n"
    assert len(process.stdout.read()) == 30000000


@both_carriers
def test_output_written_before_a_kill_is_not_lost(node):
    process = node.start_ready("head -c 3000000 /dev/zero; echo; echo written >&2; kill -9 $$")
    assert process.stdout.read() == b"\0" * 3000000 + b"\n"
    assert process.wait(DEADLINE_S) == 137


# --- Arguments, environment, directories ----------------------------------------------------------


def test_arguments_environment_and_directory_are_byte_exact(any_node):
    words = [
        b"two words", b"'\"$HOME `id`\\", b"line\nbreak", b"", b"\xff\xfe not UTF-8", b"-v", b"--",
        b"=", b"*",
    ]
    directory = any_node.job / os.fsdecode(b"d \xe9\n'$x, y")
    directory.mkdir()
    os.chown(directory, any_node.uid, -1)
    options = ["--env", "NAMED", "--env", os.fsdecode(b"SET=a\nb\xff=c ")]
    result = any_node.run(
        *options,
        "sh",
        "-c",
        'printf "%s\\0" "$@" "$NAMED" "$SET" "$SLURM_JOB_ID" "$SECRET" "$PWD"; /bin/pwd',
        "sh",
        *map(os.fsdecode, words),
        cwd=directory,
        env={"NAMED": "from caller", "SLURM_JOB_ID": "7", "SECRET": "no", "PWD": str(directory)},
    )

    path = os.fsencode(str(directory))
    assert result.stdout.split(b"\0") == words + [
        b"from caller", b"a\nb\xff=c ", b"7", b"", path, path + b"\n",
    ]


@pytest.mark.own_kernel
def test_an_argument_list_of_120_kib_arrives(node):
    words = [f"argument {i} {'x' * 100}" for i in range(1050)]
    result = node.run("sh", "-c", 'printf "%s\\n" "$@" | sha256sum', "sh", *words)
    assert (
        result.stdout.split()[0].decode()
        == hashlib.sha256("".join(word + "\n" for word in words).encode()).hexdigest()
    )


@pytest.mark.own_kernel
def test_clean_env_passes_nothing_and_cwd_starts_elsewhere(node):
    result = node.run(
        "--clean-env", "--env", "A=1", "--cwd", "/usr/bin", "sh", "-c", "env; pwd",
        env={"SLURM_JOB_ID": "7"},
    )

    assert (
        b"A=1\n" in result.stdout
        and b"SLURM" not in result.stdout
        and result.stdout.endswith(b"/usr/bin\n")
    )
    assert_error(node.run("--cwd", "/no/such", "true"), "/no/such")


def test_a_run_does_not_keep_the_syntax_tree_of_its_script_in_memory(node):
    process = node.start_ready("sleep 60")
    with open(f"/proc/{process.pid}/status") as file:
        anonymous_kib = int(re.search(r"RssAnon:\s+(\d+)", file.read())[1])
    process.terminate()
    node.finish(process)
    assert anonymous_kib < 20 << 10               # 11 to 15 of 29 to 34 MiB


def test_files_in_the_job_directory_are_the_caller_s_at_once_and_for_good(any_node):
    any_node.start_ready("echo early > early; cat > /dev/null", stdin=subprocess.PIPE)
    process = any_node.started[-1]
    wait_for(
        lambda: (
            (any_node.job / "early").exists() and (any_node.job / "early").read_text() == "early\n"
        )
    )
    process.stdin.close()
    write_by_mmap = (
        "import mmap; f = open('mapped', 'w+b'); f.truncate(1 << 20); "
        "m = mmap.mmap(f.fileno(), 0); "
        "m[:] = b'm' * (1 << 20)"
    )

    result = any_node.run(
        "python3", "-c", write_by_mmap + "; open('late', 'w').write('l' * 3000000)"
    )
    assert result.returncode == 0, result.stderr
    assert (any_node.job / "mapped").read_bytes() == b"m" * (1 << 20)
    assert (any_node.job / "late").read_text() == "l" * 3000000
    assert {path.stat().st_uid for path in any_node.job.iterdir()} == {any_node.uid}


def test_modes_of_files_in_the_job_directory_are_those_the_command_asked_for(any_node):
    os.umask(0o027)
    try:
        result = any_node.run(
            "sh", "-c", "umask; umask 0; touch a; mkdir b; umask 007; touch c; chmod 4755 c"
        )
    finally:
        os.umask(0o022)

    assert result.stdout == b"0027\n"
    assert [(any_node.job / name).stat().st_mode & 0o7777 for name in "abc"] == [
        0o666, 0o777, 0o4755,
    ]


def test_the_command_is_the_caller_in_the_guest_and_root_on_request(any_node):
    script = (
        'id -u; id -un; echo "$HOME"; readlink -f ~/job; touch ~/mine; sudo -n id -u; stat -c %u .'
    )
    result = any_node.run("sh", "-c", script)

    uid, name, home, job, sudo, owner = result.stdout.decode().split("\n")[:-1]
    assert (int(uid), job, sudo, int(owner)) == (
        any_node.uid, str(any_node.job), "0", any_node.uid,
    ), result.stderr
    assert name == pwd.getpwuid(any_node.uid).pw_name and home.endswith("/" + name)
    assert (
        any_node.run("--root", "sh", "-c", "id -u; touch by-root; echo $HOME").stdout
        == b"0\n/root\n"
    )
    assert (any_node.job / "by-root").stat().st_uid == any_node.uid


@pytest.mark.own_kernel
@pytest.mark.parametrize(
    "directory, shown",
    [
        ("/", "~/job"),
        ("/usr", "~/job"),
        ("/usr/lib", "~/job"),
        ("/etc", "~/job"),
        ("/proc", "~/job"),
        ("/tmp", "/tmp"),
        ("/home", "/home"),
        pytest.param("/root", "/root", marks=needs_root),
        ("/var/tmp", "/var/tmp"),
    ],
)
def test_the_job_directory_never_hides_the_system(node, directory, shown):
    before = sorted(os.listdir(directory)) if directory != "/proc" else None
    result = node.run(
        "sh",
        "-c",
        'pwd; echo "$HOME"; ls -d /usr/bin/env; [ "$(cat /etc/hostname)" = apppot ]',
        cwd=directory,
    )

    start, home, program = result.stdout.decode().split()
    assert (start, program, result.returncode) == (shown.replace("~", home), "/usr/bin/env", 0)
    assert directory == "/tmp" or before is None or before == sorted(os.listdir(directory))


@pytest.mark.own_kernel
def test_a_symbolic_link_in_pwd_names_the_directory_as_the_user_does(node):
    (node.root / "link").symlink_to(node.job)
    result = node.run(
        "sh",
        "-c",
        "/bin/pwd; echo here > file; cat " + str(node.job / "file"),
        cwd=node.root / "link",
        env={"PWD": str(node.root / "link")},
    )
    assert result.stdout.decode() == f"{node.root}/link\nhere\n"


def test_without_a_command_apppot_run_or_autorun_or_a_shell_runs(node, image):
    assert node.run(input=b"echo shell $0\n").stdout.startswith(b"shell -bash")
    changed = node.root / "autorun.img"
    shutil.copy(image, changed)
    changed.chmod(0o644)
    (node.root / "autorun").write_text("#!/bin/sh\necho autorun\n")
    write_into(changed, node.root / "autorun", "/etc/skel/apppot-autorun")

    write_into(changed, node.root / "autorun", "/root/apppot-autorun")
    assert node.run(image=changed).stdout == b"autorun\n"

    script = node.job / "apppot-run"
    script.write_text("#!/usr/bin/env python3\nprint('run', __file__)\n")
    for mode in (0o755, 0o644):  # a grid's stage-in loses the execute bit
        script.chmod(mode)
        assert node.run(image=changed).stdout == f"run {script}\n".encode()


# --- Images ---------------------------------------------------------------------------------------


def test_write_and_cow_keep_changes_and_leave_a_clean_file_system(any_node, image):
    own = writable_copy(any_node, image)
    os.chown(any_node.root, any_node.uid, -1)
    assert (
        any_node.run("--write", "--root", "sh", "-c", f"echo {NONCE} > /kept", image=own).returncode
        == 0
    )
    assert any_node.run("cat", "/kept", image=own).stdout.decode() == NONCE + "\n"

    check = subprocess.run(
        ["/sbin/e2fsck", "-fn", own], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert check.returncode == 0, check.stdout

    cow = f"{any_node.root}/a cow:{own}"
    assert any_node.run("--root", "sh", "-c", f"echo 2{NONCE} > /kept", image=cow).returncode == 0
    assert any_node.run("cat", "/kept", image=cow).stdout.decode() == "2" + NONCE + "\n"
    assert any_node.run("cat", "/kept", image=own).stdout.decode() == NONCE + "\n"

    os.utime(own, (1, 1))
    assert_error(any_node.run("true", image=cow), "a cow", "own.img")


@pytest.mark.own_kernel
def test_who_writes_an_image_has_it_alone(node, image):
    own = writable_copy(node, image)
    holder = node.start_ready("read line", "--write", image=own, stdin=subprocess.PIPE)

    for options in (("--write",), ()):
        result = node.run(*options, "true", image=own)
        assert result.returncode == 125
        assert_error(result, f"in use by process {holder.pid}:", own)

    holder.stdin.close()
    holder.wait(DEADLINE_S)


@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_a_whole_disk_image_boots_from_its_linux_partition(node, image, label):
    disk = node.root / "disk.img"
    size = image.stat().st_size // 512
    with open(disk, "wb") as file:
        file.truncate(image.stat().st_size + (80 << 20))
    table = f"label: {label}\nstart=2048, size=20480, type={'c' if label == 'dos' else 'uefi'}\n"
    table += f"start=32768, size={size}, type=linux\n"
    subprocess.run(["/sbin/sfdisk", "-q", disk], input=table.encode(), check=True)

    subprocess.run(
        [
            "dd", f"if={image}", f"of={disk}", "bs=1M", "seek=16", "conv=notrunc,sparse",
            "status=none",
        ],
        check=True,
    )
    assert (
        node.run(
            "sh", "-c", f"echo {NONCE}; grep -c ubda2 /proc/partitions", image=disk
        ).stdout.decode()
        == NONCE + "\n1\n"
    )


@both_carriers
def test_sixteen_runs_at_once_share_one_unchanged_image(any_node, image):
    before = digest_of(image)
    processes = [
        any_node.start("--root", "--mem", "256", "sh", "-c", f"echo {i} > /etc/motd; cat /etc/motd")
        for i in range(16)
    ]

    assert [any_node.finish(process) for process in processes] == [
        (0, f"{i}\n".encode(), b"") for i in range(16)
    ]
    assert digest_of(image) == before


def test_a_long_and_a_strange_path_are_no_obstacle(node, image):
    strange = node.root / "a, b 'c\": d"
    strange.mkdir()

    own = writable_copy(node, image, "a, b 'c\": d/im age,1.img")
    assert (
        node.run(
            "echo", NONCE, image=own, cwd=strange, env={"APPPOT_TMPDIR": str(strange)}
        ).stdout.decode()
        == NONCE + "\n"
    )
    assert os.listdir(strange) == ["im age,1.img"]


@pytest.mark.own_kernel
def test_an_agent_of_another_protocol_is_refused(node, image):
    own = writable_copy(node, image)
    replace_agent(
        node,
        own,
        "#!/usr/bin/python3 -IS\nimport sys; sys.path.insert(0, '/usr/lib/apppot')\n"
        "import apppot_init; apppot_init.PROTOCOL = 99; apppot_init.main()\n",
    )

    result = node.run("true", image=own)
    assert result.returncode == 125
    assert_error(result, "protocol 99")


# --- Threads --------------------------------------------------------------------------------------

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@pytest.mark.own_kernel
@pytest.mark.parametrize(
    "given, options, expected",
    [
        ({}, [], ["1", "1", "1"]),
        ({}, ["--clean-env"], ["1", "1", "1"]),
        ({"OPENBLAS_NUM_THREADS": "3"}, [], ["1", "3", "1"]),
        ({}, ["--env", "MKL_NUM_THREADS=4"], ["1", "1", "4"]),
        ({"OMP_NUM_THREADS": "2"}, ["--clean-env"], ["1", "1", "1"]),
        ({"OMP_NUM_THREADS": "2"}, [], ["2", "", ""]),  # which the other libraries take, too
        (
            {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "5"},
            ["--env", "OPENBLAS_NUM_THREADS="],
            ["2", "", "5"],
        ),
    ],
)
def test_numbers_of_threads_are_one_unless_given(node, given, options, expected):
    script = "".join(f'echo "${name}";' for name in THREADS)
    result = node.run("--net", "none", "-v", *options, "sh", "-c", script, env=given)
    assert result.stdout.decode().splitlines() == expected
    told = [name for name in THREADS if f"{name}=1".encode() in result.stderr]
    assert told == [name for name, value in zip(THREADS, expected) if value == "1"]
