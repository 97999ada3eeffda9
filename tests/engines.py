# SPDX-License-Identifier: Apache-2.0
"""Batch systems on this machine.

A Site is a node with namespaces of its own, so that nothing of it can be left. Its daemons have
their usual ports, sockets and directories, and see no network but their own loopback. A site runs
on this machine's files or on those of a chroot. When its init ends, by close() or because the tests
are killed, every process in it ends too, and its mounts go with them.
"""

import contextlib
import functools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

from nodes import DEADLINE_S, TOP, read_cpu_time, wait_for

USER, BYSTANDER = "griduser", "otheruser"
USERS = {USER: 61001, BYSTANDER: 61002}
ADDRESS = (
    "10.97.0.1"  # on the loopback of each site; names of 127.0.0.1 alone are no use to most engines
)
INIT = (
    "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('up', flush=True); "
    "sys.stdin.read()"
)
README = (TOP / "README.md").read_text()
PARTS = ("apppot_start.py", "linux", "apppot.img")
# Only the changes file brings this program into the guest. Number 41 fails.
RECKON = '#!/bin/sh\necho "$1 squared is $(($1 * $1))" | tee result\n[ "$1" != 41 ] || exit 9\n'
ANALYSIS = '#!/bin/sh\nexec reckon "$1"\n'


def recipe(name, is_deployed):
    """A job file of the README; where nothing is deployed as the README has it changed."""
    text = re.search(
        rf"^==> {re.escape(name)}: .*\n((?:(?!==>|```).*\n)+)", README, re.MULTILINE
    ).group(1)
    if is_deployed:
        return text
    text = text.replace(
        "transfer_input_files = ",
        "transfer_input_files = " + "".join(f"{part}, " for part in PARTS),
    )
    text = text.replace(
        "(inputFiles = ", "(inputFiles = " + "".join(f'("{part}" "")' for part in PARTS)
    )
    return text.replace("/opt/apppot/", "")


def make_changes_file(kernel, image, directory):
    """A changes file with the program that the recipes' analysis needs."""
    program = shlex.quote(RECKON)
    install = f"echo {program} > /usr/local/bin/reckon; chmod 755 /usr/local/bin/reckon"
    words = [
        "--kernel", kernel, "--image", image, "--root", "--no-job-dir", "--save-changes",
        "my.tar.gz",
    ]
    runner = [sys.executable, TOP / "apppot_start.py", *words, "sh", "-c", install]
    subprocess.run(runner, check=True, cwd=directory, stdin=subprocess.DEVNULL)
    (directory / "my.tar.gz").chmod(0o644)
    return directory / "my.tar.gz"


class Site:
    """A node: AppPot is in /opt/apppot, homes are in /home; /tmp and /dev/shm are scratch."""

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
            subprocess.run(
                ["tar", "-C", self.place / "root", "-xpf", tree, "--exclude=./dev/*"], check=True
            )

        etc = (self.place / "root" if tree else pathlib.Path("/")) / "etc"
        passwd = [f"{user}:x:{uid}:{uid}::/home/{user}:/bin/bash\n" for user, uid in USERS.items()]
        group = [f"{user}:x:{uid}:\n" for user, uid in USERS.items()]
        (self.place / "etc/passwd").write_text((etc / "passwd").read_text() + "".join(passwd))
        (self.place / "etc/group").write_text((etc / "group").read_text() + "".join(group))
        (self.place / "etc/hosts").write_text(
            f"127.0.0.1 localhost\n{ADDRESS} {name}.example.org {name}\n"
        )
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
            for name in $place/etc/*/; do [ ! -d $name ] || mount --bind $name $root/etc/$(basename $name); done
            mount -t proc none $root/proc
            mount -t tmpfs none $root/dev/shm
            mount -t tmpfs none $root/tmp
            cd "$root/"
            {f"exec chroot {root}" if tree else "exec"} /usr/bin/python3 -c "$1"
        """
        unshare = [
            "unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--propagation=private",
        ]

        self.process = subprocess.Popen(
            [*unshare, "sh", "-euc", script, "-", INIT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
        assert self.process.stdout.readline() == "up\n"

        self.init = (
            pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
            .read_text()
            .split()[0]
        )
        self.has_root = bool(tree)

    # --- In it ------------------------------------------------------------------------------------

    def start(self, *words, user=None, cwd="/", env=(), **options):
        """Popen of a command in the site: by root unless `user` is given, in a bare environment."""
        enter = [
            "nsenter", "--target", self.init, "--mount", "--uts", "--net", "--pid",
            *["--root"] * self.has_root,
        ]
        become = (
            ["setpriv", f"--reuid={USERS[user]}", f"--regid={USERS[user]}", "--clear-groups"]
            if user
            else []
        )
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
        process = self.start(
            *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )

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
            for part in PARTS:
                subprocess.run(
                    ["cp", "--sparse=always", "-p", self.place / "opt/apppot" / part, directory],
                    check=True,
                )
                (self.place / "opt/apppot" / part).unlink()
            (directory / "apppot.img").chmod(0o644)
            # As small as `make stage` makes it, since batch systems do not know holes.
            subprocess.run(
                ["resize2fs", "-f", "-M", directory / "apppot.img"], check=True, capture_output=True
            )
        return directory

    # --- What is left -----------------------------------------------------------------------------

    def processes(self, user=USER):
        """pid and command line of a user's living processes in the site."""
        namespace = os.readlink(f"/proc/{self.init}/ns/pid")
        found = {}

        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                status = pathlib.Path("/proc", pid, "status").read_text()
                is_his = re.search(r"^Uid:\t(\d+)", status, re.MULTILINE).group(1) == str(
                    USERS[user]
                )
                if (
                    is_his
                    and "\nState:\tZ" not in status
                    and os.readlink(f"/proc/{pid}/ns/pid") == namespace
                ):
                    command = pathlib.Path("/proc", pid, "cmdline").read_bytes()
                    found[int(pid)] = command.replace(b"\0", b" ").decode(errors="replace")
        return found

    def is_computing(self):
        """Whether any process of the user has used the CPU within a moment."""

        before = read_cpu_time(self.processes())
        time.sleep(0.5)
        return read_cpu_time(self.processes()) != before

    def scratch_files(self, user=USER):
        return [
            entry.path
            for directory in ("/tmp", "/dev/shm")
            for entry in os.scandir(self.path(directory))
            if entry.stat(follow_symlinks=False).st_uid == USERS[user]
        ]

    def assert_nothing_left(self, user=USER):
        with contextlib.suppress(AssertionError):
            # The engine may still be about to remove a directory of its own.
            wait_for(lambda: not self.processes(user) and not self.scratch_files(user), 10)
        assert not self.processes(user)
        assert self.scratch_files(user) == []

    def close(self):
        if self.init:
            self.process.stdin.close()
            self.process.wait(DEADLINE_S)
            self.process.stdout.close()
        shutil.rmtree(self.place)


# --- A command with AppPot and without ------------------------------------------------------------

# Less than the batch systems here wait between a warning and the end.
RUNNER = "python3 /opt/apppot/apppot_start.py --kill-after 2 "
# Commands, bash scripts that say `ready`.
HANDLES = "trap 'echo told; exit 42' {0}; echo ready; while :; do sleep 0.1; done 2> /dev/null"
IGNORES = "trap '' {0}; echo ready; exec sleep 1000"
DIES = "echo ready; exec sleep 1000"
WORKS = (
    "head -c 20000000 /dev/urandom > data; sum=$(sha256sum data); echo ready\n"
    'until [ -e go ]; do [ "$(sha256sum data)" = "$sum" ] || exit 9; done; rm data; echo right; '
    "exit 3"
)


class Pair:
    """The same command as two jobs. An engine's own says how to submit one and how it ended."""

    def __init__(self, site, script, *arguments, options="", user=USER):
        self.site, self.user = site, user
        self.ids, self.directories = [], []

        for prefix in ("", f"{RUNNER}{options} "):
            directory = site.new_directory(user)
            (directory / "command").write_text(f"#!/bin/bash\n{script}\n")
            (directory / "command").chmod(0o755)
            self.directories.append(directory)
            self.ids.append(self.submit(directory, f"{prefix}./command", *arguments))

    def each(self, *words, user=None):
        for job in self.ids:
            self.site.run(*words, job, user=user)

    def output(self, number, name="out"):
        path = self.directories[number] / name
        return path.read_text().splitlines() if path.exists() else []

    def wait_for_line(self, line):
        for number in (0, 1):
            wait_for(lambda number=number: line in self.output(number))

    def end(self):
        """How both ended, which must be alike, and what they wrote; nothing may be left."""
        plain, ours = (self.wait_ended(job) for job in self.ids)
        assert ours == plain, (
            plain,
            ours,
            [self.output(number, name) for number in (0, 1) for name in ("out", "err")],
        )
        self.site.assert_nothing_left(self.user)
        assert self.output(1) == self.output(0)
        return ours, self.output(1)


# --- Slurm ----------------------------------------------------------------------------------------

# CPUs and memory are more than there are: the jobs wait more than they compute, and memory is
# sparse.
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
ENDED = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL",
    "DEADLINE",
)


class Slurm(Site):
    """slurmctld, slurmd and munged on one node."""

    KILL_WAIT_S = 4

    def __init__(self, kernel, image, proctrack):
        self.proctrack = proctrack
        # Names the node's cgroups, which are the machine's and thus must not meet those of another
        # test.
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
        (self.place / "etc/slurm/cgroup.conf").write_text(
            CGROUP_CONF.format(constrain="yes" if confines else "no")
        )

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
        """What `scontrol show job` says. A task of an array has an id such as JOB_3."""
        text = self.run("scontrol", "-o", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait_ended(self, job, seconds=DEADLINE_S):
        """JobState and ExitCode of a job, when it has ended."""
        wait_for(lambda: self.show(job)["JobState"] in ENDED, seconds)
        shown = self.show(job)
        return shown["JobState"], shown["ExitCode"]

    def close(self):
        super().close()
        for directory in sorted(
            pathlib.Path("/sys/fs/cgroup").glob(f"**/slurm*{self.node}*"), reverse=True
        ):
            for below, _, _ in os.walk(directory, topdown=False):
                os.rmdir(below)


# --- HTCondor -------------------------------------------------------------------------------------

# Memory is more than there is, and cheap. As root condor_master would tune the kernel of the whole
# machine.
CONDOR_CONF = f"""\
CONDOR_HOST = {ADDRESS}
NETWORK_INTERFACE = {ADDRESS}
ENABLE_IPV6 = False
FULL_HOSTNAME = node.example.org
NO_DNS = True
DEFAULT_DOMAIN_NAME = example.org
UID_DOMAIN = example.org
FILESYSTEM_DOMAIN = example.org
TRUST_UID_DOMAIN = True
DAEMON_LIST = MASTER, COLLECTOR, NEGOTIATOR, SCHEDD, STARTD
ALLOW_READ = *
ALLOW_WRITE = *
ALLOW_DAEMON = *
ALLOW_NEGOTIATOR = *
ALLOW_ADMINISTRATOR = *
SEC_DEFAULT_AUTHENTICATION_METHODS = FS
NUM_CPUS = 8
MEMORY = 16000
START = TRUE
SUSPEND = FALSE
PREEMPT = FALSE
KILL = FALSE
NEGOTIATOR_INTERVAL = 2
NEGOTIATOR_CYCLE_DELAY = 1
SCHEDD_INTERVAL = 2
SCHEDD_MIN_INTERVAL = 1
UPDATE_INTERVAL = 5
BASE_CGROUP =
ENABLE_KERNEL_TUNING = False
MachineMaxVacateTime = 6
"""
CONDOR_SUBMIT = """\
executable = {}
arguments = {}
transfer_executable = {}
transfer_input_files = command, input
should_transfer_files = YES
when_to_transfer_output = ON_EXIT
stream_output = True
output = out
error = err
log = events
request_memory = 400
queue
"""


class Condor(Site):
    """All daemons of HTCondor on one node."""

    def _start(self, *arguments):
        super()._start(*arguments)
        self.path("/etc/condor/config.d/99-local.config").write_text(CONDOR_CONF)
        for place in ("spool", "log", "lib", "lib/condor/execute"):
            name = f"/var/{place}" if "execute" in place else f"/var/{place}/condor"
            self.run("install", "-d", "-o", "condor", "-g", "condor", name)

        self.run("install", "-d", "-o", "condor", "-g", "condor", "/run/condor", "/run/lock/condor")
        self.run("condor_master")
        wait_for(lambda: self.run("condor_status", "-af", "Name", check=False), 60)
        wait_for(
            lambda: "Total for all users" in self.run("condor_q", "-allusers", check=False), 60
        )

    def submit(self, directory, name):
        """Id of the first job of a submit file."""
        shown = self.run("condor_submit", "-terse", name, user=USER, cwd=self.inside(directory))
        return shown.split()[0]

    def query(self, job, *attributes):
        """Values of a job's attributes, as long as it is in the queue and after that."""
        shown = self.run("condor_q", job, "-af", *attributes) or self.run(
            "condor_history", job, "-af", *attributes
        )
        return shown.split()

    def wait_ended(self, job):
        """JobStatus (3: removed, 4: completed), ExitBySignal, ExitCode and ExitSignal."""
        wait_for(lambda: not self.run("condor_q", job, "-af", "JobStatus").strip())
        wait_for(lambda: self.query(job, "JobStatus"))
        return self.query(job, "JobStatus", "ExitBySignal", "ExitCode", "ExitSignal")


# --- Grid Engine ----------------------------------------------------------------------------------

QUEUE = """\
qname main.q
hostlist node.example.org
slots 8
pe_list NONE
load_thresholds NONE
shell /bin/sh
shell_start_mode unix_behavior
notify 00:00:04
tmpdir /tmp
"""


class GridEngine(Site):
    """Master and execution daemon of Grid Engine on one node."""

    ENVIRONMENT = {"SGE_ROOT": "/var/lib/gridengine", "SGE_CELL": "default"}

    def start(self, *words, env=(), **options):
        return super().start(*words, env={**self.ENVIRONMENT, **dict(env)}, **options)

    def _start(self, *arguments):
        super()._start(*arguments)
        self.path("/var/lib/gridengine/default/common/act_qmaster").write_text("node.example.org\n")
        self.run(
            "install", "-d", "-o", "sgeadmin", "/var/run/gridengine", "/var/spool/gridengine/execd"
        )
        self.run("/etc/init.d/gridengine-master", "start")
        wait_for(lambda: self.run("qconf", "-sh", check=False))
        self.run("qconf", "-ah", "node.example.org", check=False)
        self.run("qconf", "-as", "node.example.org")
        self.run("/etc/init.d/gridengine-exec", "start")
        wait_for(lambda: "node" in self.run("qconf", "-sel", check=False))

        # A new queue with all that is not said here as in the template.
        own = dict(line.split(" ", 1) for line in QUEUE.splitlines())
        self.configure("-sq", "-Aq", "queue", own)
        self.configure(
            "-ssconf",
            "-Msconf",
            "scheduler",
            {
                "schedule_interval": "0:0:1",
                "flush_submit_sec": "1",
                "flush_finish_sec": "1",
                "job_load_adjustments": "NONE",
            },
        )
        flush = (
            "accounting=true reporting=false flush_time=00:00:01 joblog=false "
            "accounting_flush_time=00:00:01"
        )
        self.configure(
            "-sconf", "-Mconf", "global",
            {"load_report_time": "00:00:02", "reporting_params": flush},
        )
        wait_for(
            lambda: re.search(
                r"^main\.q.* lx-amd64 *$", self.run("qstat", "-f", check=False), re.MULTILINE
            )
        )

    def configure(self, show, change, name, settings):
        """Change some settings of those that qconf shows."""
        text = re.sub(r"\\\n\s*", "", self.run("qconf", show))
        lines = [
            line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")
        ]
        text = "".join(f"{key} {settings.get(key, *value)}\n" for key, *value in lines)
        self.path(f"/tmp/{name}").write_text(text)
        self.run("qconf", change, f"/tmp/{name}")

    def submit(self, directory, *words):
        """A process that lives as long as the job."""
        environment = {"HOME": "/home/" + USER}
        return self.start(
            "qsub", "-sync", "y", *words, user=USER, cwd=self.inside(directory), env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )


# --- ARC ------------------------------------------------------------------------------------------

ARC_CONF = """\
[common]
hostname = node.example.org
x509_host_key = /etc/grid-security/testCA-hostkey.pem
x509_host_cert = /etc/grid-security/testCA-hostcert.pem
x509_cert_dir = /etc/grid-security/certificates
[authgroup:zero]
file = /etc/grid-security/testCA.allowed-subjects
[mapping]
map_to_user = zero griduser:griduser
[lrms]
lrms = fork
[arex]
wakeupperiod = 1
[arex/ws]
wsurl = https://node.example.org:8443/arex
[arex/ws/jobs]
allowaccess = zero
[infosys]
[infosys/glue2]
[infosys/cluster]
[queue:fork]
"""


class Arc(Site):
    """A-REX with REST and the fork back end, and a client with a proxy of a test authority."""

    CLIENT = {
        "X509_CERT_DIR": "/etc/grid-security/certificates",
        "X509_USER_PROXY": f"/home/{USER}/proxy",
        "HOME": f"/home/{USER}",
    }
    URL = "https://node.example.org:8443/arex"
    STATUS = "/var/spool/arc/jobstatus"

    def _start(self, *arguments):
        super()._start(*arguments)
        self.path("/etc/arc.conf").write_text(ARC_CONF)
        self.run("arcctl", "test-ca", "usercert", "-n", "grid01", "-i", USER, "-f")
        self.run("mkdir", "-p", "/run/arc", self.STATUS)

        # Else A-REX has a pair of 4096 bits made, which takes a CPU some minutes.
        self.run("openssl", "dhparam", "-dsaparam", "-out", f"{self.STATUS}/dhparam.pem", "2048")
        for name in ("arc-arex-start", "arc-arex-ws-start"):
            self.run("sh", "-c", f"setsid /usr/share/arc/{name} > /dev/null 2>&1 < /dev/null &")
        self.client("arcproxy")
        # What it publishes, without which the client submits nothing.
        wait_for((self.path(self.STATUS) / "info.xml").exists)
        knock = ["bash", "-c", "exec 3<> /dev/tcp/node.example.org/8443 && echo open"]
        wait_for(functools.partial(self.run, *knock, check=False))

    def client(self, *words, **options):
        return self.run(*words, user=USER, env=self.CLIENT, **options)

    def submit(self, directory, name):
        """URL of a job."""
        words = ["arcsub", "-T", "arcrest", "-C", self.URL, name]
        return re.search(r"https://\S+", self.client(*words, cwd=self.inside(directory))).group(0)

    def scratch_files(self, user=USER):
        """Without those of ARC itself, which keeps the scripts it has run."""
        return [path for path in super().scratch_files(user) if "/fork_job_script." not in path]

    def session(self, job):
        """The directory where a job runs."""
        return self.path(f"/var/spool/arc/sessiondir/{job.rpartition('/')[2]}")

    def wait_ended(self, job):
        """Why it failed, and the program's exit code; what the client knows comes later."""
        status = self.path(self.STATUS)
        name = f"job.{job.rpartition('/')[2]}"
        wait_for((status / "finished" / f"{name}.status").exists)
        failed, diag = (status / f"{name}.failed", status / f"{name}.diag")
        code = re.search(r"^exitcode=(.*)", diag.read_text(), re.MULTILINE)
        return (failed.read_text().strip() if failed.exists() else "", code and code.group(1))
