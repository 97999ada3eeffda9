# SPDX-License-Identifier: Apache-2.0
"""Batch systems on this machine: a Site is a node with namespaces of its own, so that nothing of it can be left.

In a site daemons have their usual ports, sockets and directories, and see no network but their own loopback. It runs
on this machine's files or on those of a chroot. When its init ends, by close() or as the tests are killed, so does
every process in it, and its mounts go with them.
"""

import contextlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

from conftest import DEADLINE_S, TOP, wait_for

USER, BYSTANDER = "griduser", "otheruser"
USERS = {USER: 61001, BYSTANDER: 61002}
ADDRESS = "10.97.0.1"  # on the loopback of each site; names of 127.0.0.1 alone are no use to most engines
INIT = "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('up', flush=True); sys.stdin.read()"
README = (TOP / "README.md").read_text()
# Only the changes file brings this program into the guest. Number 41 fails.
RECKON = '#!/bin/sh\necho "$1 squared is $(($1 * $1))" | tee result\n[ "$1" != 41 ] || exit 9\n'
ANALYSIS = '#!/bin/sh\nexec reckon "$1"\n'


def recipe(name, is_deployed):
    """A job file of the README; where nothing is deployed as the README has it changed."""
    text = re.search(rf"^==> {re.escape(name)}: .*\n((?:(?!==>|```).*\n)+)", README, re.MULTILINE).group(1)
    return text if is_deployed else text.replace("/opt/apppot/", "")


def make_changes_file(kernel, image, directory):
    """A changes file with the program that the recipes' analysis needs."""
    program = shlex.quote(RECKON)
    install = f"echo {program} > /usr/local/bin/reckon; chmod 755 /usr/local/bin/reckon"
    words = ["--kernel", kernel, "--image", image, "--root", "--no-job-dir", "--save-changes", "my.tar.gz"]
    runner = [sys.executable, TOP / "apppot_start.py", *words, "sh", "-c", install]
    subprocess.run(runner, check=True, cwd=directory, stdin=subprocess.DEVNULL)
    (directory / "my.tar.gz").chmod(0o644)
    return directory / "my.tar.gz"


class Site:
    """A node: /opt/apppot holds the three files of AppPot, /home the users' homes; /tmp and /dev/shm are scratch."""

    def __init__(self, kernel, image, tree=None, name="node"):
        self.place = pathlib.Path(tempfile.mkdtemp(prefix="apppot-test-"))
        self.place.chmod(0o755)
        self.init = None
        try:
            self._fill(kernel, image, tree, name)
            self._start(tree, name)
        except BaseException:
            self.close()
            raise

    def _fill(self, kernel, image, tree, name):
        for directory in ("opt/apppot", "home", "etc", "root"):
            (self.place / directory).mkdir(parents=True)
        for user, uid in USERS.items():
            self.home(user).mkdir()
            os.chown(self.home(user), uid, uid)
        shutil.copy(TOP / "apppot_start.py", self.place / "opt/apppot")
        shutil.copy(kernel, self.place / "opt/apppot/linux")
        (self.place / "opt/apppot/linux").chmod(0o755)
        os.link(image, self.place / "opt/apppot/apppot.img")
        if tree:
            subprocess.run(["tar", "-C", self.place / "root", "-xpf", tree, "--exclude=./dev/*"], check=True)
        etc = (self.place / "root" if tree else pathlib.Path("/")) / "etc"
        passwd = [f"{user}:x:{uid}:{uid}::/home/{user}:/bin/bash\n" for user, uid in USERS.items()]
        group = [f"{user}:x:{uid}:\n" for user, uid in USERS.items()]
        (self.place / "etc/passwd").write_text((etc / "passwd").read_text() + "".join(passwd))
        (self.place / "etc/group").write_text((etc / "group").read_text() + "".join(group))
        (self.place / "etc/hosts").write_text(f"127.0.0.1 localhost\n{ADDRESS} {name}.example.org {name}\n")
        (self.place / "etc/resolv.conf").write_text("")
    def _start(self, tree, name):
        root = self.place / "root" if tree else ""
        script = f"""
            place={self.place} root={root}
            hostname {name}
            ip link set lo up
            ip address add {ADDRESS}/32 dev lo
            if [ "$root" ]; then
                mount --bind $root $root      # HTCondor's starter wants a mount point there
                mount --rbind /dev $root/dev
                for name in opt home; do mount --bind $place/$name $root/$name; done
                for name in passwd group hosts resolv.conf; do cp $place/etc/$name $root/etc/$name; done
            else
                for name in opt home; do mount --bind $place/$name /$name; done
                for name in passwd group hosts; do mount --bind $place/etc/$name /etc/$name; done
                mount -t tmpfs -o mode=755 none /run
            fi
            for name in $place/etc/*/; do mount --bind $name $root/etc/$(basename $name); done
            mount -t proc none $root/proc
            mount -t tmpfs none $root/dev/shm
            mount -t tmpfs none $root/tmp
            cd "$root/"
            {f"exec chroot {root}" if tree else "exec"} /usr/bin/python3 -c "$1"
        """
        unshare = ["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--propagation=private"]
        self.process = subprocess.Popen(
            [*unshare, "sh", "-euc", script, "-", INIT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
        assert self.process.stdout.readline() == "up\n"
        self.init = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0]
        self.has_root = bool(tree)

    # --- In it ---------------------------------------------------------------------------------------------

    def start(self, *words, user=None, cwd="/", env=(), **options):
        """Popen of a command in the site, by root unless `user` is given, with a minimal environment."""
        enter = ["nsenter", "--target", self.init, "--mount", "--uts", "--net", "--pid", *["--root"] * self.has_root]
        become = ["setpriv", f"--reuid={USERS[user]}", f"--regid={USERS[user]}", "--clear-groups"] if user else []
        path = "/usr/bin:/bin" if user else "/usr/sbin:/usr/bin:/sbin:/bin"
        return subprocess.Popen(
            [*enter, *become, "env", "-C", cwd, *words],
            env={"PATH": path, **dict(env)},
            **{"stdin": subprocess.DEVNULL, **options},
        )

    def run(self, *words, check=True, input=None, **options):
        """stdout of a command in the site."""
        if input is not None:
            options["stdin"] = subprocess.PIPE
        process = self.start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        try:
            stdout, stderr = process.communicate(input, timeout=DEADLINE_S)
        except BaseException:
            process.kill()
            process.wait()
            raise
        assert not check or process.returncode == 0, (words, process.returncode, stdout, stderr)
        return stdout

    def path(self, name):
        """A path in the site, as seen from outside."""
        return pathlib.Path(f"/proc/{self.init}/root{name}")

    def home(self, user=USER):
        return self.place / "home" / user

    def new_directory(self, user=USER):
        """A fresh job directory; its path in the site is the same below /home as below home()."""
        path = pathlib.Path(tempfile.mkdtemp(prefix="job-", dir=self.home(user)))
        os.chown(path, USERS[user], -1)
        return path

    def inside(self, path):
        """The site's own name of a path below its homes."""
        return "/" + str(path.relative_to(self.place))

    def fill_job_directory(self, changes, name, is_deployed):
        """A job directory for a recipe of the README, with what it says a job brings."""
        directory = self.new_directory()
        (directory / name).write_text(recipe(name, is_deployed))
        (directory / "analysis").write_text(ANALYSIS)
        (directory / "analysis").chmod(0o755)
        shutil.copy(changes, directory)
        if not is_deployed:
            for part in ("apppot_start.py", "linux", "apppot.img"):
                os.link(self.place / "opt/apppot" / part, directory / part)
            shutil.rmtree(self.place / "opt/apppot")
        return directory

    # --- What is left --------------------------------------------------------------------------------------

    def processes(self, user=USER):
        """pid and command line of a user's living processes in the site."""
        namespace = os.readlink(f"/proc/{self.init}/ns/pid")
        found = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                status = pathlib.Path("/proc", pid, "status").read_text()
                is_his = re.search(r"^Uid:\t(\d+)", status, re.MULTILINE).group(1) == str(USERS[user])
                if is_his and "\nState:\tZ" not in status and os.readlink(f"/proc/{pid}/ns/pid") == namespace:
                    command = pathlib.Path("/proc", pid, "cmdline").read_bytes()
                    found[int(pid)] = command.replace(b"\0", b" ").decode(errors="replace")
        return found

    def scratch_files(self, user=USER):
        return [
            entry.path
            for directory in ("/tmp", "/dev/shm")
            for entry in os.scandir(self.path(directory))
            if entry.stat(follow_symlinks=False).st_uid == USERS[user]
        ]

    def assert_nothing_left(self, user=USER):
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self.processes(user), 5)
        assert not self.processes(user)
        assert not self.scratch_files(user)

    def close(self):
        if self.init:
            self.process.stdin.close()
            self.process.wait(DEADLINE_S)
            self.process.stdout.close()
        shutil.rmtree(self.place)


# --- Slurm ----------------------------------------------------------------------------------------------------

# CPUs and memory are more than there are: the jobs wait more than they compute, and memory is sparse.
SLURM_CONF = f"""\
ClusterName=test
SlurmctldHost=node({ADDRESS})
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile=/run/slurm/slurmctld.log
SlurmdLogFile=/run/slurm/slurmd.log
ProctrackType=proctrack/{{proctrack}}
TaskPlugin={{task}}
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
DefMemPerNode=400
MaxArraySize=1001
KillWait={{kill_wait}}
ReturnToService=2
MpiDefault=none
MailProg=/bin/true
MinJobAge=3600
NodeName={{node}} NodeHostname=node NodeAddr={ADDRESS} CPUs=16 RealMemory=64000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
CGROUP_CONF = """\
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace={constrain}
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE")


class Slurm(Site):
    """slurmctld, slurmd and munged on one node."""

    KILL_WAIT_S = 4

    def __init__(self, kernel, image, proctrack):
        self.proctrack = proctrack
        # Names the node's cgroups, which are the machine's and thus must not meet those of another test.
        self.node = f"apppot-test-{os.urandom(4).hex()}"
        super().__init__(kernel, image)

    def _fill(self, *arguments):
        super()._fill(*arguments)
        (self.place / "etc/slurm").mkdir()
        confines = self.proctrack == "cgroup"
        settings = SLURM_CONF.format(
            proctrack=self.proctrack,
            task="task/cgroup" if confines else "task/none",
            kill_wait=self.KILL_WAIT_S,
            node=self.node,
        )
        (self.place / "etc/slurm/slurm.conf").write_text(settings)
        (self.place / "etc/slurm/cgroup.conf").write_text(CGROUP_CONF.format(constrain="yes" if confines else "no"))

    def _start(self, *arguments):
        super()._start(*arguments)
        self.run("mkdir", "-p", "/run/munge", "/run/slurm/state", "/run/slurm/spool")
        key = self.path("/run/munge/key")
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        own = [f"--{name}-file=/run/munge/{name}" for name in ("key", "pid", "seed", "log")]
        self.run("munged", *own)
        self.run("slurmctld")
        self.run("slurmd", "-N", self.node)
        wait_for(lambda: self.run("sinfo", "-h", "-o", "%T", check=False).strip() == "idle")

    def submit(self, script, *options, user=USER, cwd=None, env=()):
        """Id of a batch job, of a script's text."""
        words = ["sbatch", "--parsable", *options]
        return self.run(*words, input=script, user=user, cwd=cwd or "/", env=env).strip()

    def show(self, job):
        """What `scontrol show job` says, as a dictionary; of an array's task 3 with the id JOB_3."""
        text = self.run("scontrol", "-o", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait_ended(self, job, seconds=DEADLINE_S):
        """JobState and ExitCode of a job, when it has ended."""
        wait_for(lambda: self.show(job)["JobState"] in ENDED, seconds)
        shown = self.show(job)
        return shown["JobState"], shown["ExitCode"]

    def close(self):
        super().close()
        for directory in sorted(pathlib.Path("/sys/fs/cgroup").glob(f"**/slurm*{self.node}*"), reverse=True):
            for below, _, _ in os.walk(directory, topdown=False):
                os.rmdir(below)
