# SPDX-License-Identifier: Apache-2.0
##
## AppPot: run a complete Linux appliance as an ordinary, unprivileged job
##
##   make demo     install what is missing, build the image, run a command in it
##   make check    install what is missing, run the linters and all tests, with Debian's kernel and with build/linux
##   make check-grid
##                 as root: test on HTCondor, Grid Engine and ARC, and the set-up of bare machines, in chroots
##   make lint     run the linters, ruff and mypy, alone
##   make image    build build/apppot.img, an appliance with Debian
##   make kernel   build build/linux, a static kernel that boots in 0.2 s; this takes 10 minutes
##   make stage    fill build/stage/ with the three files of a job and apppot-stage.tar, which has all three;
##                 with KERNEL=debian at once, otherwise with build/linux
##   make install  put script, kernel, image and man page below PREFIX, for all users of a site
##   make mpi-image
##                 build build/mpi.img, an appliance with Open MPI, for a test
##   make science-image
##                 build build/science.img, an appliance with numpy and gcc, for bench
##   make bench    measure what a run costs, by phase and beside other tools; this takes 15 minutes
##   make deps     install the Debian packages that these targets need
##   make clean    remove build/
##
## Variables (make image SUITE=testing PACKAGES="gcc gfortran"):
##   IMAGE         the image file                              default: build/apppot.img
##   SUITE         the Debian suite in the image               default: stable
##   PACKAGES      more Debian packages for the image
##   IMAGE_SIZE    size of the image, free space included      default: 2G
##   MIRROR        the Debian mirror                           default: that of this machine's apt
##   KERNEL        the User-Mode Linux kernel for demo, check and bench; `debian`: that of Debian, also for stage and install
##                       default: demo takes Debian's, bench takes build/linux, check takes both in turn
##   PREFIX        where install puts bin/, lib/apppot/ and share/man/; DESTDIR comes before it
##                                                             default: /usr/local
##   KERNEL_SUITE  the Debian suite whose linux-source becomes build/linux
##                                                             default: testing
##   PYTESTARGS    arguments of pytest in check, such as "-k signal -x"
##   JOBS          number of parts of check that run at once   default: one per CPU
##   CACHE         what builds keep; remove it to get a fresh Debian
##                                                             default: ~/.cache/apppot

IMAGE       ?= build/apppot.img
SUITE       ?= stable
PACKAGES    ?=
IMAGE_SIZE  ?= 2G
MIRROR      ?=
KERNEL      ?= $(APPPOT_KERNEL)
KERNEL_SUITE ?= testing
PREFIX      ?= /usr/local
DESTDIR     ?=
PYTESTARGS  ?=
JOBS        ?= $(shell nproc)
# apt installs pytest for Debian's own Python. Another Python may come first in PATH.
PYTHON      ?= /usr/bin/python3
# A batch job's HOME may be unset, missing or read-only.
CACHE       ?= $(if $(shell test -w "$(HOME)" && echo yes),$(HOME)/.cache/apppot,build/cache)

DEBIAN_KERNEL := /usr/bin/linux.uml
JOB_KERNEL    := build/linux
ifeq ($(KERNEL),debian)
override KERNEL := $(DEBIAN_KERNEL)
JOB_KERNEL    := $(DEBIAN_KERNEL)
endif

AGENT    := apppot_init.py $(wildcard changes.py)
IN_IMAGE := python3 bash sudo less procps ca-certificates curl vim-tiny

# What the targets need, as PACKAGE:COMMAND, PACKAGE:FILE or PACKAGE:MODULE.py. The package is installed only if the
# command, file or module is missing. The lists are complete: a machine may have nothing but Debian's essential packages,
# and recommended packages are not installed.
AS_ROOT    := $(if $(filter 0,$(shell id -u)),,unshare --map-root-user --map-auto)
BUILD_DEPS := mmdebstrap:mmdebstrap e2fsprogs:resize2fs mount:mount $(if $(AS_ROOT),uidmap:newuidmap)
KERNEL_DEPS := gcc:gcc libc6-dev:/usr/include/stdio.h binutils:ld bc:bc flex:flex bison:bison xz-utils:xz patch:patch
RUN_DEPS   := $(if $(filter-out $(DEBIAN_KERNEL),$(KERNEL)),,user-mode-linux:linux.uml) slirp4netns:slirp4netns
TOOL_DEPS  := fdisk:sfdisk e2fsprogs:debugfs uml-utilities:uml_mconsole slirp:slirp-fullbolt iproute2:ip curl:curl \
              procps:ps uidmap:newuidmap \
              git:git rsync:rsync acl:setfacl attr:setfattr \
              umoci:umoci buildah:buildah slurmctld:slurmctld slurmd:slurmd slurm-client:sbatch munge:munged
BENCH_DEPS := proot:proot bubblewrap:bwrap charliecloud-runtime:ch-run qemu-system-x86:qemu-system-x86_64 \
              busybox-static:busybox cpio:cpio gnuplot-nox:gnuplot
# With the tests of Python itself, which run in the guest, too.
TEST_DEPS   = python3-pytest:pytest.py python3-hypothesis:hypothesis.py \
              libpython$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-testsuite:test.test_os.py
LINT_DEPS  := python3-pip:pip.py
CHECK_DEPS  = $(BUILD_DEPS) $(RUN_DEPS) $(KERNEL_DEPS) $(TOOL_DEPS) $(TEST_DEPS) $(LINT_DEPS)

# pip brings the linters, in exact versions: another version finds other faults, and Debian has old ones or none.
LINTERS := ruff==0.17.6 mypy==2.4.1

# Each batch system runs in a chroot with a Debian that has it.
ENGINES             := condor gridengine arc
# Nodes with an older and a newer Python and C library than this machine's.
NODES               := debian-11 debian-13
# Machines that have nothing but what README asks for.
MACHINES            := debian-12 debian-13
CHROOTS             := $(sort $(patsubst %,build/%.tar,$(ENGINES) $(NODES) $(MACHINES)))
SUITE_debian-11     := bullseye
SUITE_debian-12     := bookworm
PACKAGES_debian-12  := make git ca-certificates
SUITE_debian-13     := trixie
PACKAGES_debian-13  := make git ca-certificates
SUITE_condor        := trixie
PACKAGES_condor     := condor procps
SUITE_gridengine    := bookworm
PACKAGES_gridengine := procps gridengine-master gridengine-exec gridengine-client
SUITE_arc           := bookworm
PACKAGES_arc        := procps $(addprefix nordugrid-arc-,arex client plugins-needed plugins-arcrest plugins-internal arcctl \
                       arcctl-service) openssl perl time

# The shell is bash. It gets SIGTERM when make ends, also if SIGKILL ended make.
SHELL       := /usr/bin/setpriv
.SHELLFLAGS := --pdeathsig TERM /bin/bash -euo pipefail -c
.ONESHELL:
# A second apt-get at the same time would fail at the lock of the first.
.NOTPARALLEL:
# make need not delete a target after an interrupt: a target appears by renaming, when it is complete.
.PRECIOUS: $(IMAGE)

# An ordinary user's PATH does not have mke2fs and debugfs.
export PATH := $(PATH):/usr/sbin:/sbin
# In the source tree only build/ is written.
export PYTHONDONTWRITEBYTECODE := 1
export HYPOTHESIS_STORAGE_DIRECTORY := $(abspath build/hypothesis)
export APPPOT_IMAGE := $(abspath $(IMAGE))
ifneq ($(KERNEL),)
export APPPOT_KERNEL := $(abspath $(KERNEL))
endif

.PHONY: help demo check check-grid lint image mpi-image science-image kernel stage install bench clean FORCE
.PHONY: deps deps-demo deps-check deps-bench deps-build deps-kernel deps-lint

help:
	@sed -n 's/^## \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

demo: deps-demo image
	@run="python3 apppot_start.py$(if $(filter-out build/apppot.img,$(IMAGE)), --image $(IMAGE))"
	echo "$$run sh -c 'uname -a; head -n 1 /etc/os-release'"
	$(PYTHON) apppot_start.py --image $(IMAGE) sh -c 'uname -a; head -n 1 /etc/os-release'
	echo "make: it works; try next:"
	echo "    $$run    # a shell in the appliance; exit leaves it"
	echo "    $$run --root --save-changes my.tar.gz apt-get install -y gcc libc6-dev"
	echo "    $$run --changes my.tar.gz gcc --version"

# All tests with Debian's kernel, and those that boot with our own, too.
check: deps-check lint image mpi-image stage $(if $(AS_ROOT),,$(NODES:%=build/%.tar))
	@mkdir -p build
	test_part() {
	    status=0
	    kernels=($(or $(KERNEL),"$$(command -v linux.uml)" build/linux))
	    for number in "$${!kernels[@]}"; do
	        APPPOT_KERNEL=$$(realpath "$${kernels[number]}") $(PYTHON) -m pytest --shard "$$1/$(JOBS)" \
	            --kernel "$$((number + 1))/$${#kernels[@]}" $(PYTESTARGS) tests & pytest=$$!
	        trap 'kill $$pytest 2> /dev/null; wait' EXIT
	        code=0
	        wait $$pytest || code=$$?
	        # 5: no test of this part was selected.
	        [ $$code = 0 ] || [ $$code = 5 ] || status=1
	    done
	    trap - EXIT
	    exit $$status
	}
	pids=
	trap 'kill $$pids 2> /dev/null; wait' EXIT
	for part in $$(seq $(JOBS)); do
	    test_part "$$part" > "build/check-$$part.log" 2>&1 &
	    pids+=" $$!"
	done
	status=0
	for pid in $$pids; do wait "$$pid" || status=1; done
	trap - EXIT
	for part in $$(seq $(JOBS)); do cat "build/check-$$part.log"; done
	exit $$status

# The engines run at the same time, because their tests wait more than they compute. The bare machines of the set-up
# tests get the kernel and the caches that are built here.
check-grid: deps-check image mpi-image stage $(CHROOTS)
	@mkdir -p build
	export APPPOT_KERNEL=$(abspath $(or $(KERNEL),build/linux))
	pids=
	trap 'kill $$pids 2> /dev/null; wait' EXIT
	for engine in $(ENGINES) setup; do
	    $(PYTHON) -m pytest -m grid $(PYTESTARGS) tests/test_$$engine.py > build/check-$$engine.log 2>&1 &
	    pids+=" $$!"
	done
	status=0
	for pid in $$pids; do wait "$$pid" || status=1; done
	trap - EXIT
	for engine in $(ENGINES) setup; do cat "build/check-$$engine.log"; done
	exit $$status

# If build/lint is missing, the linters in PATH have the right versions.
lint: build/lint
	@export PATH=$(abspath build/lint)/bin:$$PATH PYTHONPATH=$(abspath build/lint)
	ruff check --quiet --config tests/pyproject.toml *.py tests
	mypy --no-error-summary --config-file tests/pyproject.toml

bench: deps-bench image science-image kernel
	$(PYTHON) tests/bench.py

clean:
	rm -rf build

# ---- packages ----------------------------------------------------------------------------------------------------

# Each goal installs everything that it needs at once.
deps:            deps_wanted = $(CHECK_DEPS) $(BENCH_DEPS)
deps-demo:       deps_wanted = $(BUILD_DEPS) $(RUN_DEPS)
deps-check:      deps_wanted = $(CHECK_DEPS)
deps-bench:      deps_wanted = $(CHECK_DEPS) $(BENCH_DEPS)
deps-build:      deps_wanted = $(BUILD_DEPS)
deps-kernel:     deps_wanted = $(KERNEL_DEPS)
deps-lint:       deps_wanted = $(LINT_DEPS)
deps deps-demo deps-check deps-bench deps-build deps-kernel deps-lint:
	@missing=
	is_there() {
	    case $$1 in
	    /*) [ -e "$$1" ] ;;
	    *.py) $(PYTHON) -c "import importlib.util as u; exit(not u.find_spec('$${1%.py}'))" ;;
	    *) command -v "$$1" > /dev/null ;;
	    esac
	}
	for dep in $(deps_wanted); do
	    is_there "$${dep#*:}" || [[ $$missing\  = *\ $${dep%:*}\ * ]] || missing+=" $${dep%:*}"
	done
	[ -n "$$missing" ] || exit 0
	if [ "$$(id -u)" != 0 ]; then
	    echo "make: error: not installed:$$missing" >&2
	    echo "make: hint: sudo apt-get update; sudo apt-get install -y --no-install-recommends$$missing" >&2
	    exit 1
	fi
	export DEBIAN_FRONTEND=noninteractive
	# The tests start their own daemons. With this file the packages start none (invoke-rc.d(8)).
	if [ ! -e /usr/sbin/policy-rc.d ]; then
	    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
	    printf '%s\n' '#!/bin/sh' 'exit 101' > /usr/sbin/policy-rc.d
	    chmod 755 /usr/sbin/policy-rc.d
	fi
	# A failure is no error yet: it may be about a source that is not Debian's. The next command fails if it matters.
	apt-get update || true
	apt-get install -y --no-install-recommends $$missing

# ---- kernel ------------------------------------------------------------------------------------------------------
# User-Mode Linux from Debian's source, with only what an appliance needs: allnoconfig and these options, NAME or
# NAME=VALUE, without modules and debugging. The build fails if an option is not in the resulting .config.
#
# The patches in .kernel/ make it faster and right. In a patch "Options:" names the options that come with it, "Lost:" what a
# kernel without it lacks. The kernel's --showconfig names its patches in CONFIG_BUILD_SALT, which has no other effect here.

# The program runs on every x86-64 machine and needs no library. KALLSYMS names the functions in a panic message.
KERNEL_OPTIONS := 64BIT STATIC_LINK SMP NR_CPUS=64 CC_OPTIMIZE_FOR_PERFORMANCE EXPERT PRINTK BUG KALLSYMS
# What programs expect of any Linux. CHECKPOINT_RESTORE makes /proc/sys/kernel/ns_last_pid, which the agent writes.
KERNEL_OPTIONS += MULTIUSER UID16 FUTEX EPOLL SIGNALFD TIMERFD EVENTFD SHMEM AIO IO_URING ADVISE_SYSCALLS MEMBARRIER \
    CROSS_MEMORY_ATTACH FHANDLE POSIX_TIMERS HIGH_RES_TIMERS NO_HZ_IDLE ELF_CORE COREDUMP SYSVIPC POSIX_MQUEUE KEYS SWAP \
    CHECKPOINT_RESTORE BINFMT_ELF BINFMT_SCRIPT BINFMT_MISC INOTIFY_USER FANOTIFY DNOTIFY FILE_LOCKING UNIX98_PTYS \
    HW_RANDOM UML_RANDOM
# Containers inside the appliance.
KERNEL_OPTIONS += SECCOMP SECCOMP_FILTER NAMESPACES UTS_NS TIME_NS IPC_NS USER_NS PID_NS NET_NS CGROUPS MEMCG CGROUP_PIDS \
    CPUSETS CGROUP_FREEZER CGROUP_SCHED FAIR_GROUP_SCHED CFS_BANDWIDTH CGROUP_CPUACCT CGROUP_DEVICE BLK_CGROUP
# User-Mode Linux's own devices: the disk, the host's files, the channel and the console, the management console.
KERNEL_OPTIONS += BLOCK BLK_DEV BLK_DEV_UBD HOSTFS SSL STDERR_CONSOLE NULL_CHAN PTY_CHAN TTY_CHAN MCONSOLE MAGIC_SYSRQ
# Images: partitions, loop devices, an initrd. The device mapper makes a root file system larger than its image.
KERNEL_OPTIONS += PARTITION_ADVANCED MSDOS_PARTITION EFI_PARTITION BLK_DEV_LOOP BLK_DEV_INITRD RD_GZIP RD_ZSTD \
    MD BLK_DEV_DM DM_INIT
# File systems.
KERNEL_OPTIONS += PROC_FS PROC_SYSCTL PROC_CHILDREN PROC_PAGE_MONITOR SYSFS DEVTMPFS TMPFS TMPFS_POSIX_ACL TMPFS_XATTR \
    EXT4_FS EXT4_USE_FOR_EXT2 EXT4_FS_POSIX_ACL EXT4_FS_SECURITY OVERLAY_FS FUSE_FS ISO9660_FS MSDOS_FS VFAT_FS \
    NLS NLS_CODEPAGE_437 NLS_ISO8859_1 NLS_UTF8 MISC_FILESYSTEMS \
    SQUASHFS SQUASHFS_XATTR SQUASHFS_ZLIB SQUASHFS_LZ4 SQUASHFS_LZO SQUASHFS_XZ SQUASHFS_ZSTD \
    EROFS_FS EROFS_FS_XATTR EROFS_FS_POSIX_ACL EROFS_FS_ZIP EROFS_FS_ZIP_LZMA EROFS_FS_ZIP_DEFLATE EROFS_FS_ZIP_ZSTD \
    VIRTIO_FS NETWORK_FILESYSTEMS NFS_FS NFS_V3 NFS_V3_ACL NFS_V4 NFS_V4_0 NFS_V4_2
# The network. IPV6_SIT would add an interface that nobody asked for.
KERNEL_OPTIONS += NET PACKET UNIX INET IPV6 IP_MULTICAST NETDEVICES NET_CORE VETH BRIDGE TUN WIREGUARD SLIP UML_NET_VECTOR \
    VIRTIO_MENU VIRTIO_UML VIRTIO_NET VIRTIO_CONSOLE CRYPTO CRYPTO_USER_API_HASH CRYPTO_USER_API_SKCIPHER \
    IPV6_SIT=n MODULES=n DEBUG_INFO_NONE

# Its input: $$source is the tar, $$version its version, $$patches the directory of the patches, $$tmp as below. The vector
# network device looks addresses up by the C library, so the kernel's configuration forbids it in a static program, which
# cannot do that without the library's files. The sed allows it, because AppPot gives the device a socket and no address.
define BUILD_KERNEL
mkdir "$$tmp/source"
tar -xJf "$$source" -C "$$tmp/source" --strip-components=1
cd "$$tmp/source"
sed -i '/^config UML_NET_VECTOR$$/,/^$$/{/select MAY_HAVE_RUNTIME_DEPS/d}' arch/um/drivers/Kconfig
export KBUILD_BUILD_USER=apppot KBUILD_BUILD_HOST=apppot KBUILD_BUILD_VERSION=1
export KBUILD_BUILD_TIMESTAMP=$$(date -u -r Makefile)
unset MAKEFLAGS MAKELEVEL MFLAGS
options="$(KERNEL_OPTIONS)"
applied=
for file in "$$patches"/*.patch; do
    name=$$(basename "$$file" .patch)
    if patch --dry-run -s -f -F0 -p1 < "$$file" > /dev/null; then
        patch -s -F0 -p1 < "$$file"
        applied+=" $$name"
        options+=" $$(sed -n 's/^Options: //p' "$$file")"
    else
        echo "make: warning: Linux $$version gets no .kernel/$$name.patch, which does not apply to it" >&2
        echo "make: hint: this kernel lacks: $$(sed -n 's/^Lost: //p' "$$file")" >&2
    fi
done
make -s ARCH=um allnoconfig
scripts/config --set-str BUILD_SALT "$${applied# }"
for option in $$options; do
    case $$option in
    *=*) scripts/config --set-val "$${option%=*}" "$${option#*=}" ;;
    *) scripts/config --enable "$$option" ;;
    esac
done
make -s ARCH=um olddefconfig
for option in $$options; do
    case $$option in
    *=n) wanted="# CONFIG_$${option%=n} is not set" ;;
    *=*) wanted=CONFIG_$$option ;;
    *) wanted=CONFIG_$$option=y ;;
    esac
    grep -q -x "$$wanted" .config || {
        echo "make: error: this kernel's source does not do $$option" >&2
        echo "make: hint: another KERNEL_SUITE, or another KERNEL_OPTIONS" >&2
        exit 1
    }
done
make -s ARCH=um -j "$$(nproc)" linux
strip -o "$$tmp/kernel" linux
endef

# ---- image -------------------------------------------------------------------------------------------------------
# Three recipes make an image. BOOTSTRAP makes a tar of a Debian system, which is slow and happens once for each suite and
# list of packages. COMPOSE makes a file system of it, with the agent. RECORD boots the file system and records it as the
# base. Results are cached under a hash of the recipe's text and input. $tmp is a directory of the recipe, $rootfs the tar.

define BOOTSTRAP
mmdebstrap --variant=minbase --format=tar \
    --include="$(IN_IMAGE) $(PACKAGES)" \
    --aptopt='Acquire::Languages "none"' --aptopt='Acquire::GzipIndexes "true"' --skip=cleanup/apt/lists \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-include=/usr/share/locale/locale.alias' \
    --dpkgopt='path-exclude=/usr/share/lintian/*' --dpkgopt='path-exclude=/usr/share/bug/*' \
    --setup-hook='printf "%s\n" "$$apt_settings" > "$$1/etc/apt/apt.conf.d/00host"' \
    --setup-hook='for n in 1 2 3 4 5 6 7 8; do mkdir -p "$$1/usr/share/man/man$$n"; done' \
    --customize-hook='rm "$$1/etc/apt/apt.conf.d/00host"' \
    --customize-hook='cd "$$1/var/log"; rm -f apt/* dpkg.log alternatives.log bootstrap.log fontconfig.log' \
    "$(SUITE)" "$$tmp/rootfs.tar" "$$tmp/sources.list"
endef

# The features of the file system are listed here, so that every kernel from 4.x on mounts it and an e2fsck of that age
# checks it. The inode tables and the journal are complete: otherwise the guest's kernel would complete them at each boot, in
# the COW file of the run. The journal is small for the same reason. The file system's UUID is the base id for the host.
define COMPOSE
umask 022
root=$$tmp/root
mkdir "$$root"
tar -C "$$root" -xpf "$$rootfs" --xattrs --xattrs-include='*' --numeric-owner --exclude='./dev/*'
install -d "$$root/usr/lib/apppot" "$$root/var/lib/apppot"
install -m 644 $(AGENT) "$$root/usr/lib/apppot"
chroot "$$root" /usr/bin/python3 -IS -m compileall -q --invalidation-mode unchecked-hash /usr/lib/apppot
# Writes a file with these lines. It first removes what is there, which may be a link that leads to a file of this
# machine, as resolv.conf of systemd-resolved does.
write() {
    rm -f "$$root/$$2"
    printf '%s\n' "$${@:3}" > "$$root/$$2"
    chmod "$$1" "$$root/$$2"
}
# This imports the agent, because Python keeps no compiled form of a main program.
write 755 sbin/apppot-init '#!/usr/bin/python3 -IS' \
    'import sys; sys.path.insert(0, "/usr/lib/apppot")' \
    'import apppot_init; apppot_init.main()'
write 755 usr/bin/apppot-snap '#!/usr/bin/python3 -IS' \
    'import sys; sys.path.insert(0, "/usr/lib/apppot")' \
    'import changes; sys.exit(changes.main(sys.argv[1:]))'
# sudo apt-get, too, needs the proxies and certificates of the node.
write 440 etc/sudoers.d/apppot 'ALL ALL=(ALL:ALL) NOPASSWD: ALL' \
    'Defaults env_keep += "http_proxy https_proxy ftp_proxy all_proxy no_proxy"' \
    'Defaults env_keep += "HTTP_PROXY HTTPS_PROXY FTP_PROXY ALL_PROXY NO_PROXY"' \
    'Defaults env_keep += "SSL_CERT_FILE CURL_CA_BUNDLE REQUESTS_CA_BUNDLE APT_CONFIG"'
# Packages must not ask when a job installs them, nor complain that nobody can be asked.
chroot "$$root" debconf-set-selections <<< 'debconf debconf/frontend select Noninteractive'
write 644 etc/hostname apppot
write 644 etc/hosts '127.0.0.1 localhost apppot' '::1 localhost'
write 644 etc/resolv.conf 'nameserver 10.0.2.3'
base_id=$$(cat /proc/sys/kernel/random/uuid)
write 644 var/lib/apppot/base-id "$$base_id"
mke2fs -q -F -t ext4 -L apppot -U "$$base_id" -m 0 -J size=16 \
    -O none,has_journal,ext_attr,resize_inode,dir_index,sparse_super,large_file,huge_file \
    -O filetype,extent,64bit,flex_bg,dir_nlink,extra_isize,metadata_csum \
    -E lazy_itable_init=0,lazy_journal_init=0 -d "$$root" "$$tmp/image" $(IMAGE_SIZE) || {
    echo "make: error: no file system of IMAGE_SIZE=$(IMAGE_SIZE) with $$(du -sm "$$root" | cut -f 1) MiB of files in it" >&2
    echo "make: hint: give another IMAGE_SIZE; mke2fs's message is above" >&2
    exit 1
}
endef

# This runs in a guest, because only there the files have the inode numbers and times that later show changes.
define RECORD
cd "$$tmp"
status=0
TMPDIR=$$tmp "$${APPPOT_KERNEL:-linux.uml}" ubd0=image root=/dev/ubda rw mem=256M con=null \
    con0=null,fd:1 uml_dir=. init=/bin/sh -- -c '"mount -n -t proc proc /proc && apppot-snap base &&
    mount -n -o remount,ro / && echo 77 > /proc/exitcode; echo o > /proc/sysrq-trigger; sleep 60"' \
    > console 2>&1 < /dev/null || status=$$?
[ $$status = 77 ] || {
    cat console >&2
    echo "make: error: the image does not boot far enough to record its base: status $$status" >&2
    echo "make: hint: look at its console above" >&2
    exit 1
}
endef

export BOOTSTRAP COMPOSE RECORD BUILD_KERNEL

# ---- the cache ---------------------------------------------------------------------------------------------------
# Functions for the recipes that fill the cache. A lock allows one build of a kind at a time. Files in $$tmp when the lock
# is taken are those of a build that was killed.

define WITH_WORDS
say() { echo "make: $$*"; }
die() { echo "make: error: $$1" >&2; echo "make: hint: $$2" >&2; exit 1; }
mib() { du -cm "$$@" 2> /dev/null | tail -n 1 | cut -f 1; }

# The tools say it late, some of a wrong cause, and others remove what they wrote before anybody can look.
need_room() {
    local free
    free=$$(df -m --output=avail "$$1" | tail -n 1)
    [ "$$free" -ge "$$2" ] || die "no space for $@: $$1 has $$((free)) MiB left, and it takes $$2" "$$3"
}

# On a terminal, a line says twice a second how far the work is: $$1 and what the code $$2 prints. It goes at the end.
start_progress() {
    [ -t 2 ] && [ "$${TERM:-dumb}" != dumb ] || return 0
    while sleep 0.5 && kill -0 $$$$ 2> /dev/null; do
        # The cursor goes back, so that an error begins a line.
        printf '\rmake: %s: %s\033[K\r' "$$1" "$$(eval "$$2" 2> /dev/null || true)"
    done >&2 &
    progress=$$!
}

end_progress() {
    [ -n "$${progress:-}" ] || return 0
    kill "$$progress" 2> /dev/null || true
    wait "$$progress" 2> /dev/null || true
    progress=
    printf '\r\033[K' >&2
}
endef

define WITH_CACHE
$(WITH_WORDS)

enter_cache() {
    mkdir -p "$(CACHE)" $(@D)
    cache=$$(cd "$(CACHE)" && pwd)
    export tmp=$$cache/tmp-$$1
    own_apt=(env LC_ALL=C APT_CONFIG="$$tmp/apt.conf")
    ended=$${!-}
    trap 'exit 1' HUP INT TERM
    trap leave_cache EXIT
    exec 9> "$$cache/lock-$$1"
    flock -n 9 || { say "waiting for another make"; run_in_group flock 9; }
    is_locked=yes
    remove_tmp
    mkdir "$$tmp"
}

leave_cache() {
    trap '' HUP INT TERM
    end_progress
    # A process that has just started may not lead its process group yet.
    [ "$${!-}" = "$$ended" ] || kill "$$!" 2> /dev/null || true
    end_group
    rm -f $@.new $@.key.new
    [ -z "$${is_locked:-}" ] || remove_tmp
}

# A build by an ordinary user leaves files of other users of a user namespace, which only root of the namespace can remove.
remove_tmp() {
    rm -rf "$$tmp" 2> /dev/null || $(AS_ROOT) rm -rf "$$tmp"
}

# Runs a command without the lock. No process of it is left when the command or make has ended.
run() {
    run_in_group "$$@" 9>&-
}

# A session makes a process group, so that all processes of the command can be ended. mmdebstrap sends SIGHUP to its
# process group when it fails, and that must not be make's.
run_in_group() {
    local status=0
    setsid "$$@" < /dev/null &
    wait "$$!" || status=$$?
    end_group
    return "$$status"
}

end_group() {
    local group=$${!-}
    [ "$$group" != "$$ended" ] || return 0
    kill -TERM "-$$group" 2> /dev/null || true
    for _ in {1..100}; do
        kill -0 "-$$group" 2> /dev/null || break
        sleep 0.1
    done
    kill -KILL "-$$group" 2> /dev/null || true
    wait "$$group" 2> /dev/null || true
    ended=$$group
}

# Prints the lines of a sources.list for a suite, with the mirrors of this machine.
list_sources() {
    mirrors() {
        apt-get indextargets --format '$$(LABEL) $$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' | sort -u
    }
    available=$$(mirrors)
    if [ -z "$${available}$(MIRROR)" ] && [ "$$(id -u)" = 0 ]; then run apt-get update >&2; available=$$(mirrors); fi
    first() { awk -v label="$$1" '$$1 == label { print $$2; exit }' <<< "$$available"; }
    mirror=$(or $(MIRROR),$$(first Debian))
    security=$$(first Debian-Security)
    [ -n "$$mirror" ] || die "apt on this machine knows no Debian mirror" "apt-get update as root, or MIRROR=URL"
    by=signed-by=/usr/share/keyrings/debian-archive-keyring.gpg
    echo "deb [$$by] $$mirror $$1 main"
    case $$1 in
    sid | unstable | *-backports) ;;
    *)
        echo "deb [$$by] $$mirror $$1-updates main"
        if [ -n "$$security" ]; then echo "deb [$$by] $$security $$1-security main"; fi ;;
    esac
}

# Gives an apt with state in $$tmp the lists of a suite, because this machine's apt may know other suites only.
read_lists() {
    list_sources "$$1" > "$$tmp/sources.list"
    mkdir -p "$$tmp"/{state/lists,cache/archives}/partial
    for setting in Etc::sourcelist=$$tmp/sources.list Etc::sourceparts=/dev/null State=$$tmp/state Cache=$$tmp/cache \
        State::status=/dev/null; do
        echo "Dir::$${setting%%=*} \"$${setting#*=}\";"
    done > "$$tmp/apt.conf"
    echo 'APT::Sandbox::User "root"; APT::Update::Error-Mode "any"; Acquire::Languages "none";' >> "$$tmp/apt.conf"
    run "$${own_apt[@]}" apt-get -qq update || die "cannot get the lists of Debian $$1 from $$mirror" \
        "give another $$2, or another MIRROR; apt's message is above"
}

# Checks names before anything is downloaded. Commas may separate them, as in mmdebstrap.
check_packages() {
    simulate=("$${own_apt[@]}" apt-get -qq -s --no-install-recommends install --)
    if run "$${simulate[@]}" $$(tr , ' ' <<< "$$*") > "$$tmp/apt.log" 2>&1; then return; fi
    unknown=$$(sed -n "s/^E: Unable to locate package //p; s/^E: Package '\(.*\)' has no .*candidate$$/\1/p" "$$tmp/apt.log")
    hint="give other PACKAGES, or another SUITE"
    [ -z "$$unknown" ] || die "no package $$(xargs <<< "$$unknown") in Debian $(SUITE)" "$$hint"
    cat "$$tmp/apt.log" >&2
    die "Debian $(SUITE) cannot install $$*" "$$hint; apt's message is above"
}

# Copies a file of the cache to the target. The cache keeps the few files that were used last.
deliver() {
    need_room $(@D) "$$(mib "$$1")" "remove what you do not need there"
    cp --reflink=auto --sparse=always --preserve=mode,timestamps "$$1" $@.new
    echo "$$2" > $@.key.new
    mv $@.new $@
    mv $@.key.new $@.key
    say "$@: $$(du -m $@ | cut -f 1) MiB on disk"
    touch -c -a "$$1"
    for kind in rootfs image kernel lint; do
        find "$$cache" -maxdepth 1 -name "$$kind-*" -printf '%A@ %p\n' |
            sort -rn | tail -n +5 | cut -d ' ' -f 2- | xargs -r -d '\n' rm -r
    done
}
endef

image: $(IMAGE)

mpi-image:
	@$(MAKE) --no-print-directory image IMAGE=build/mpi.img PACKAGES="openmpi-bin python3-mpi4py"

science-image:
	@$(MAKE) --no-print-directory image IMAGE=build/science.img PACKAGES="python3-numpy gcc libc6-dev"

# The recipe decides whether to build. Time stamps do not tell make that a variable changed, and --write changes them.
$(IMAGE): FORCE deps-demo
	@$(WITH_CACHE)
	rootfs_key=$$({ uname -m; echo "$$BOOTSTRAP"; } | sha256sum | cut -c 1-16)
	image_key=$$({ echo "$$rootfs_key $$COMPOSE $$RECORD"; sha256sum $(AGENT); } | sha256sum | cut -c 1-16)
	is_built() { [ -e $@ ] && [ "$$(cat $@.key 2>/dev/null)" = "$$image_key" ]; }
	if is_built; then say "$@ is up to date"; exit; fi
	[ ! -e $@ ] || [ -e $@.key ] || die "$@ exists and was not made here" "remove it, or give another IMAGE"
	[[ "$(IMAGE_SIZE)" =~ ^[1-9][0-9]*[KMGTkmgt]$$ ]] ||
	    die "not a size: IMAGE_SIZE=$(IMAGE_SIZE)" "a number with M, G or T, such as 4G"
	enter_cache image
	if is_built; then exit; fi
	export rootfs=$$cache/rootfs-$$rootfs_key.tar
	image=$$cache/image-$$image_key
	# This tries chroot, because a machine may allow a user namespace but nothing in it.
	[ -e "$$image" ] || run $(AS_ROOT) chroot / true 2> "$$tmp/refusal" || {
	    cat "$$tmp/refusal" >&2
	    die "this machine lets ordinary users have no user namespace to build in" \
	        "run 'sudo make $(MAKECMDGOALS)', or add ranges for $$(id -un) to /etc/subuid and /etc/subgid (man subuid)"
	}
	if [ ! -e "$$rootfs" ] && [ ! -e "$$image" ]; then
	    need_room "$${TMPDIR:-/tmp}" 600 "another TMPDIR, or remove what you do not need"
	    need_room "$$cache" 300 "another CACHE, or remove what you do not need"
	    read_lists "$(SUITE)" SUITE
	    check_packages $(IN_IMAGE) $(PACKAGES)
	    say "Debian $(SUITE): download and install, a few minutes"
	    # These settings are how this machine's apt reaches its mirrors: proxies, certificates, clocks.
	    export apt_settings=$$(apt-config dump Acquire | grep -E '^Acquire::(https?|ftp|Check-)')
	    run bash -euo pipefail -c "$$BOOTSTRAP"
	    mv "$$tmp/rootfs.tar" "$$rootfs"
	fi
	if [ ! -e "$$image" ]; then
	    need_room "$$cache" $$((3 * $$(mib "$$rootfs"))) "another CACHE, or remove what you do not need"
	    say "file system of $(IMAGE_SIZE) with the agent"
	    start_progress "files, then the file system" 'echo "$$(mib "$$tmp"/{root,image}) of about $$((5 * $$(mib "$$rootfs") / 2)) MiB"'
	    run $(AS_ROOT) bash -euo pipefail -c "$$COMPOSE"
	    run bash -euo pipefail -c "$$RECORD"
	    end_progress
	    mv "$$tmp/image" "$$image"
	fi
	touch -c -a "$$rootfs"
	# --write on the target must not change the cache, so this is a copy. COW files record its time stamp.
	deliver "$$image" "$$image_key"

# The image becomes as small as possible; a run makes it larger again. e2fsck only checks here: a repair would touch
# directories, which would then count as changed.
stage: image $(if $(filter $(DEBIAN_KERNEL),$(JOB_KERNEL)),deps-demo,kernel)
	@umask 022
	$(WITH_WORDS)
	trap end_progress EXIT
	stage=build/stage
	start_progress "checking $(IMAGE)" 'echo "$$(mib $(IMAGE)) MiB"'
	e2fsck -fn $(IMAGE) > build/e2fsck.log 2>&1 || {
	    cat build/e2fsck.log
	    echo "make: error: the image is damaged: $(IMAGE)" >&2
	    echo "make: hint: e2fsck -f $(IMAGE) repairs it, or remove it and make image" >&2
	    exit 1
	}
	key=$$(cat apppot_start.py $(IMAGE).key; stat -L -c '%Y %s' $(IMAGE) $(JOB_KERNEL))
	[ "$$key" != "$$(cat $$stage.key 2> /dev/null)" ] || { echo "make: $$stage is up to date"; exit; }
	rm -rf $$stage $$stage.new $$stage.key
	need_room build $$((2 * $$(mib $(IMAGE) $(JOB_KERNEL)))) "remove what you do not need"
	mkdir $$stage.new
	end_progress
	# The image and, in the tar file, all files once more.
	start_progress "copying to $$stage" 'echo "$$(mib $$stage.new) of about $$((2 * $$(mib $(IMAGE) $(JOB_KERNEL)))) MiB"'
	cp --sparse=always $(IMAGE) $$stage.new/apppot.img
	resize2fs -f -M $$stage.new/apppot.img > build/resize2fs.log 2>&1
	cp apppot_start.py $$stage.new
	cp $(JOB_KERNEL) $$stage.new/linux
	# Debian's kernel needs them for the files of the host.
	[ $(JOB_KERNEL) != $(DEBIAN_KERNEL) ] ||
	    find /usr/lib/uml/modules \( -name fuse.ko -o -name virtiofs.ko \) -exec cp -t $$stage.new {} +
	cd $$stage.new
	chmod 755 linux apppot_start.py
	sha256sum apppot_start.py linux apppot.img $$(find -name '*.ko' -printf '%P ') > SHA256SUMS
	tar --sparse --owner=0 --group=0 -cf apppot-stage.tar *
	cd - > /dev/null
	end_progress
	mv $$stage.new $$stage
	echo "$$key" > $$stage.key
	du -m $$stage/*

# The man page is what --help says.
define MAN_PAGE
COLUMNS=72 $(PYTHON) apppot_start.py --help all | awk -v title='.TH APPPOT 1 "" "AppPot"' '
    BEGIN { print title "\n.SH NAME\napppot \\- run a command in a Linux appliance as an ordinary process\n.SH SYNOPSIS\n.nf" }
    { gsub(/\\/, "\\e"); gsub(/-/, "\\-"); sub(/^\./, "\\&.") }
    sub(/^usage: /, "") { sub(/apppot_start.py/, "apppot"); print; print ".SH DESCRIPTION\n.nf"; next }
    /^[A-Za-z][A-Za-z ]*:$$/ { sub(/:$$/, ""); print ".SH " toupper($$0) "\n.nf"; next }
    { print }'
endef

# The script finds kernel and image beside itself, also when it is called by the links in bin/.
install: stage
	@umask 022
	home=$(DESTDIR)$(PREFIX)/lib/apppot
	man=$(DESTDIR)$(PREFIX)/share/man/man1
	install -d "$$home" $(DESTDIR)$(PREFIX)/bin "$$man"
	install -m 755 build/stage/apppot_start.py build/stage/linux "$$home"
	for module in build/stage/*.ko; do [ ! -e "$$module" ] || install -m 644 "$$module" "$$home"; done
	cp --sparse=always build/stage/apppot.img "$$home/apppot.img.new"
	chmod 644 "$$home/apppot.img.new"
	mv "$$home/apppot.img.new" "$$home/apppot.img"
	for name in apppot apppot-start; do ln -sf ../lib/apppot/apppot_start.py $(DESTDIR)$(PREFIX)/bin/$$name; done
	$(MAN_PAGE) > "$$man/apppot.1"
	echo "make: $(DESTDIR)$(PREFIX)/bin/apppot is there; apppot --doctor looks at a node"

kernel: build/linux

# An apt with its own lists finds the newest source of the suite, whichever Debian this machine has.
build/linux: FORCE deps-kernel
	@$(WITH_CACHE)
	export patches=$$PWD/.kernel
	key=$$({
	    uname -m; gcc -dumpfullversion; echo "$(KERNEL_SUITE) $$BUILD_KERNEL"
	    cd "$$patches"; sed -s -n '1F; /^Options: /p; /^diff /,$$p' *.patch
	} | sha256sum | cut -c 1-16)
	if [ -e $@ ] && [ "$$(cat $@.key 2>/dev/null)" = "$$key" ]; then say "$@ is up to date"; exit; fi
	enter_cache kernel
	read_lists "$(KERNEL_SUITE)" KERNEL_SUITE
	package=$$("$${own_apt[@]}" apt-cache depends linux-source | awk '$$1 == "Depends:" { print $$2; exit }')
	version=$$("$${own_apt[@]}" apt-cache show "$$package" | awk '$$1 == "Version:" { print $$2; exit }')
	[ -n "$$version" ] || die "no kernel source in Debian's $(KERNEL_SUITE)" "give another KERNEL_SUITE"
	kernel=$$cache/kernel-$$key-$$version
	if [ ! -e "$$kernel" ]; then
	    need_room "$$cache" 2500 "another CACHE, or remove what you do not need"
	    say "Linux $$version: download and build, 10 minutes; make stage KERNEL=debian takes Debian's at once"
	    run env -C "$$tmp" "$${own_apt[@]}" apt-get -qq download "$$package=$$version"
	    run bash -euo pipefail -c 'dpkg-deb --fsys-tarfile "$$1"_*.deb | tar -xO "$$2"' - \
	        "$$tmp/$$package" "./usr/src/$$package.tar.xz" > "$$tmp/source.tar.xz"
	    export version source=$$tmp/source.tar.xz
	    start_progress "compiling" 'echo "$$(find "$$tmp/source" -name "*.o" | wc -l) of about 1,300 objects"'
	    run bash -euo pipefail -c "$$BUILD_KERNEL"
	    end_progress
	    mv "$$tmp/kernel" "$$kernel"
	fi
	deliver "$$kernel" "$$key"

# ---- linters -----------------------------------------------------------------------------------------------------

# A link to what pip installed for this Python. There is none if the linters in PATH have the right versions.
build/lint: FORCE deps-lint
	@$(WITH_CACHE)
	rm -f $@
	is_there() {
	    read -r name version _ <<< "$$("$${1%==*}" --version 2> /dev/null)" && [ "$$name==$$version" = "$$1" ]
	}
	missing=
	for linter in $(LINTERS); do is_there "$$linter" || missing=yes; done
	[ -n "$$missing" ] || exit 0
	python=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_config_var("SOABI"))')
	key=$$(echo "$$python $(LINTERS)" | sha256sum | cut -c 1-16)
	enter_cache lint
	linters=$$cache/lint-$$key
	if [ ! -e "$$linters" ]; then
	    say "$(LINTERS): download, half a minute"
	    # The machine may have no compiler, so pip takes what is built already. make's cache replaces pip's own.
	    run $(PYTHON) -m pip --quiet --disable-pip-version-check install --target "$$tmp/lint" --only-binary :all: \
	        --no-cache-dir --root-user-action ignore $(LINTERS) ||
	        die "pip cannot get $(LINTERS)" "pip's message is above; make asks pip for nothing if PATH has these versions"
	    mv "$$tmp/lint" "$$linters"
	fi
	touch -c -a "$$linters"
	ln -s "$$linters" $@

# ---- chroots -----------------------------------------------------------------------------------------------------
# The tests run in these. The host's name is set because packages of batch systems ask for it when they are installed.

define CHROOT
echo node > /proc/sys/kernel/hostname
mmdebstrap --variant=apt --format=tar --include="python3 $$packages" \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --setup-hook='printf "%s\n" "$$apt_settings" > "$$1/etc/apt/apt.conf.d/00host"' \
    --essential-hook='echo node > "$$1/etc/hostname"' \
    --essential-hook='printf "%s\n" "127.0.0.1 localhost" "10.97.0.1 node.example.org node" > "$$1/etc/hosts"' \
    "$$suite" "$$tmp/chroot.tar" "$$tmp/sources.list"
endef
export CHROOT

$(CHROOTS): build/%.tar: FORCE deps-build
	@$(WITH_CACHE)
	suite=$(SUITE_$*)
	packages="$(PACKAGES_$*)"
	key=$$(echo "$$(uname -m) $$suite $$packages $$CHROOT" | sha256sum | cut -c 1-16)
	[ "$$(id -u)" = 0 ] || die "chroot needs root" "sudo make $@"
	enter_cache chroot
	tar=$$cache/chroot-$*-$$key.tar
	if [ ! -e "$$tar" ]; then
	    say "$* in Debian $$suite: download and install, a minute"
	    list_sources $$suite > "$$tmp/sources.list"
	    export suite packages apt_settings=$$(apt-config dump Acquire | grep -E '^Acquire::(https?|ftp|Check-)')
	    run unshare --uts bash -euo pipefail -c "$$CHROOT"
	    mv "$$tmp/chroot.tar" "$$tar"
	    find "$$cache" -maxdepth 1 -name 'chroot-$*-*' ! -path "$$tar" -delete
	fi
	ln -sf "$$tar" $@

FORCE:
