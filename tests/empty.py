#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the program `empty` (github.com/mezantrop/empty) where the tests do not find it.

Usage: empty -f -i FIFO1 -o FIFO2 [-p FILE.PID] [-L FILE.LOG] command [argument...]

It does what `empty -f` does, in its order and with its gaps: a daemon that makes both FIFOs itself
and takes no others, a program on a raw pty, one loop that moves bytes one way at a time, no word
about the program's end.
"""

import getopt
import os
import pty
import select
import signal
import sys
import termios

SIZE = 64 << 10


def usage():
    sys.stderr.write(
        "empty stand-in usage:\n" + __doc__.splitlines()[2].replace("Usage: ", "") + "\n"
    )
    sys.exit(255)


def parse(argv):
    try:
        options, command = getopt.getopt(argv, "Scvhfrb:kwslp:x:i:o:t:L:e")
    except getopt.GetoptError:
        usage()

    options = dict(options)
    if not {"-f", "-i", "-o"} <= set(options) or not command:
        usage()
    return options, command


def become_daemon():
    """Return in the daemon. The caller ends when the daemon says so or is dead."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)

    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(0)
    return writer


def make_fifo(path):
    os.mkfifo(path, 0o700)  # fails if it is there
    return os.open(path, os.O_RDWR)


def run_program(command, follower):
    os.setsid()
    os.close(os.open(os.ttyname(follower), os.O_RDWR))  # it becomes the controlling terminal
    for descriptor in (0, 1, 2):
        os.dup2(follower, descriptor)
    set_raw(0)

    try:
        os.execvp(command[0], command)
    finally:
        os.kill(0, signal.SIGTERM)
        os._exit(0)


def set_raw(descriptor):
    """cfmakeraw(3); tty.setraw() leaves a little."""
    attributes = termios.tcgetattr(descriptor)
    attributes[0] = attributes[1] = attributes[3] = 0
    attributes[2] = attributes[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    termios.tcsetattr(descriptor, termios.TCSAFLUSH, attributes)


def forward_signals(child, files):
    def act(number, frame):
        if number != signal.SIGCHLD:
            os.kill(child, number)
        elif os.waitpid(child, os.WNOHANG)[0]:
            for path in files:
                os.unlink(path)
            os._exit(0)

    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, act)


def relay(leader, fifo_in, fifo_out, log):
    ways = {fifo_in: (leader, b">>>"), leader: (fifo_out, b"<<<")}
    while True:
        for source in select.select(list(ways), [], [])[0]:
            try:
                content = os.read(source, SIZE)
            except OSError:
                continue
            target, mark = ways[source]
            os.write(target, content)
            if log is not None:
                os.write(log, mark + content)


def main(argv):
    options, command = parse(argv)
    ready = become_daemon()
    if "-p" in options:
        with open(options["-p"], "w") as file:
            file.write(f"{os.getpid()}\n")

    log = (
        os.open(options["-L"], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o700)
        if "-L" in options
        else None
    )
    fifo_in, fifo_out = make_fifo(options["-i"]), make_fifo(options["-o"])
    os.write(ready, b"\n")
    os.close(ready)
    leader, follower = pty.openpty()
    child = os.fork()
    if child == 0:
        run_program(command, follower)
    forward_signals(child, [options[name] for name in ("-i", "-o", "-p") if name in options])
    relay(leader, fifo_in, fifo_out, log)


if __name__ == "__main__":
    main(sys.argv[1:])
