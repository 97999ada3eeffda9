# SPDX-License-Identifier: Apache-2.0
##
## AppPot: run a complete Linux appliance as an ordinary, unprivileged job
##
##   make demo     set up what is missing, build the image, run a command in it
##   make check    the same set-up, then all tests
##   make image    build/apppot.img, an appliance with Debian
##   make mpi-image
##                 build/mpi.img, the same with Open MPI, for a test
##   make bench    what a run costs, by phase
##   make deps     install the Debian packages that the targets above use
##   make clean    remove build/
##
## Variables (make image SUITE=testing PACKAGES="gcc gfortran"):
##   IMAGE         the image file                              build/apppot.img
##   SUITE         the Debian suite in it                      stable
##   PACKAGES      more Debian packages for it
##   IMAGE_SIZE    its size, free space included               2G
##   MIRROR        its Debian mirror                           that of this machine's apt
##   KERNEL        the UML kernel for demo, check and bench    linux.uml of Debian
##   PYTESTARGS    for check, such as "-k signal -x"
##   JOBS          in how many parts check runs at once        one per CPU
##   CACHE         what builds keep; remove it for a fresh Debian
##                                                             ~/.cache/apppot

IMAGE       ?= build/apppot.img
SUITE       ?= stable
PACKAGES    ?=
IMAGE_SIZE  ?= 2G
MIRROR      ?=
KERNEL      ?= $(APPPOT_KERNEL)
PYTESTARGS  ?=
JOBS        ?= $(shell nproc)
# Debian's own Python, where apt puts pytest: another one may come first in PATH.
PYTHON      ?= /usr/bin/python3
# A batch job's HOME may be unset, missing or read-only.
CACHE       ?= $(if $(shell test -w "$(HOME)" && echo yes),$(HOME)/.cache/apppot,build/cache)

AGENT    := apppot_init.py $(wildcard changes.py)
IN_IMAGE := python3 bash sudo less procps ca-certificates curl vim-tiny

# What the targets need, as PACKAGE:COMMAND; a command of other origin will do.
AS_ROOT    := $(if $(filter 0,$(shell id -u)),,unshare --map-root-user --map-auto)
BUILD_DEPS := mmdebstrap:mmdebstrap e2fsprogs:mke2fs mount:mount $(if $(AS_ROOT),uidmap:newuidmap)
RUN_DEPS   := $(if $(KERNEL),,user-mode-linux:linux.uml) slirp4netns:slirp4netns
TOOL_DEPS  := fdisk:sfdisk e2fsprogs:debugfs uml-utilities:uml_mconsole slirp:slirp-fullbolt iproute2:ip curl:curl \
              umoci:umoci buildah:buildah slurmctld:slurmctld slurmd:slurmd slurm-client:sbatch munge:munged
TEST_DEPS  := python3-pytest python3-hypothesis

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
# Two apt-get at once would only meet at its lock.
.NOTPARALLEL:
# Files appear by renaming, so an interrupt leaves nothing half-made that make would have to delete.
.PRECIOUS: $(IMAGE)

# mke2fs and debugfs are not in an ordinary user's PATH.
export PATH := $(PATH):/usr/sbin:/sbin
# Nothing but build/ is written in the source tree.
export PYTHONDONTWRITEBYTECODE := 1
export HYPOTHESIS_STORAGE_DIRECTORY := $(abspath build/hypothesis)
export APPPOT_IMAGE := $(abspath $(IMAGE))
ifneq ($(KERNEL),)
export APPPOT_KERNEL := $(abspath $(KERNEL))
endif

.PHONY: help demo check image mpi-image bench deps deps-build deps-run deps-tools deps-test clean FORCE

help:
	@sed -n 's/^## \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

demo: deps-build deps-run image
	$(PYTHON) apppot_start.py --image $(IMAGE) sh -c 'uname -a; head -n 1 /etc/os-release'

check: deps-build deps-run deps-tools deps-test image mpi-image
	@mkdir -p build
	pids=
	trap 'kill $$pids 2> /dev/null; wait' EXIT
	for part in $$(seq $(JOBS)); do
	    $(PYTHON) -m pytest --shard $$part/$(JOBS) $(PYTESTARGS) tests > build/check-$$part.log 2>&1 &
	    pids+=" $$!"
	done
	status=0
	for pid in $$pids; do
	    code=0
	    wait "$$pid" || code=$$?
	    # 5: no test of this part was selected.
	    [ $$code = 0 ] || [ $$code = 5 ] || status=1
	done
	trap - EXIT
	for part in $$(seq $(JOBS)); do cat build/check-$$part.log; done
	exit $$status

bench: deps-build deps-run deps-tools image
	$(PYTHON) tests/bench.py

clean:
	rm -rf build

# ---- packages ----------------------------------------------------------------------------------------------------

deps: deps-build deps-run deps-tools deps-test

# The shell variable `missing` holds package names.
define install_missing
	[ -n "$$missing" ] || exit 0
	if [ "$$(id -u)" != 0 ]; then
	    echo "make: error: not installed:$$missing" >&2
	    echo "make: hint: sudo apt-get install -y --no-install-recommends$$missing" >&2
	    exit 1
	fi
	export DEBIAN_FRONTEND=noninteractive
	# The tests start their own daemons; those of the packages are not to run (invoke-rc.d(8)).
	if [ ! -e /usr/sbin/policy-rc.d ]; then
	    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
	    printf '%s\n' '#!/bin/sh' 'exit 101' > /usr/sbin/policy-rc.d
	    chmod 755 /usr/sbin/policy-rc.d
	fi
	# Somebody else's source may be out of reach; whether Debian's is, the next command says.
	apt-get update || true
	apt-get install -y --no-install-recommends $$missing
endef

deps-build: deps_wanted = $(BUILD_DEPS)
deps-run:   deps_wanted = $(RUN_DEPS)
deps-tools: deps_wanted = $(TOOL_DEPS)
deps-build deps-run deps-tools:
	@missing=
	for dep in $(deps_wanted); do
	    command -v "$${dep#*:}" >/dev/null || missing+=" $${dep%:*}"
	done
	$(install_missing)

deps-test:
	@missing=
	for package in $(TEST_DEPS); do
	    $(PYTHON) -c "import importlib.util as u; exit(not u.find_spec('$${package#python3-}'))" || missing+=" $$package"
	done
	$(install_missing)

# ---- image -------------------------------------------------------------------------------------------------------
# Three recipes, cached under a hash of their text and of what they read: BOOTSTRAP makes a tar of a Debian system (the
# slow part, once per suite and package list), COMPOSE turns it into a file system with the agent, and RECORD boots that
# to record it as the base (a few seconds). They run with $tmp, a directory of their own, and $rootfs, the tar.

define BOOTSTRAP
mmdebstrap --variant=minbase --format=tar \
    --include="$(IN_IMAGE) $(PACKAGES)" \
    --aptopt='Acquire::Languages "none"' --aptopt='Acquire::GzipIndexes "true"' --skip=cleanup/apt/lists \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-include=/usr/share/locale/locale.alias' \
    --dpkgopt='path-exclude=/usr/share/lintian/*' --dpkgopt='path-exclude=/usr/share/bug/*' \
    --setup-hook='printf "%s\n" "$$apt_settings" > "$$1/etc/apt/apt.conf.d/00host"' \
    --customize-hook='rm "$$1/etc/apt/apt.conf.d/00host"' \
    --customize-hook='cd "$$1/var/log"; rm -f apt/* dpkg.log alternatives.log bootstrap.log fontconfig.log' \
    "$(SUITE)" "$$tmp/rootfs.tar" "$$tmp/sources.list"
endef

# The file system's features are listed, not left to mke2fs: every kernel from 4.x on mounts it, and so does e2fsck of
# that time. Inode tables and journal are complete, else the guest kernel would fill them in at each boot, into the
# run's COW file. The journal is small for the same reason. The host reads the base id as the file system's UUID.
define COMPOSE
umask 022
root=$$tmp/root
mkdir "$$root"
tar -C "$$root" -xpf "$$rootfs" --xattrs --xattrs-include='*' --numeric-owner --exclude='./dev/*'
install -d "$$root/usr/lib/apppot" "$$root/var/lib/apppot"
install -m 644 $(AGENT) "$$root/usr/lib/apppot"
chroot "$$root" /usr/bin/python3 -IS -m compileall -q --invalidation-mode unchecked-hash /usr/lib/apppot
# The agent itself is imported, as Python keeps no compiled form of a main program.
printf '%s\n' '#!/usr/bin/python3 -IS' \
    'import sys; sys.path.insert(0, "/usr/lib/apppot")' \
    'import apppot_init; apppot_init.main()' > "$$root/sbin/apppot-init"
printf '%s\n' '#!/usr/bin/python3 -IS' \
    'import sys; sys.path.insert(0, "/usr/lib/apppot")' \
    'import changes; sys.exit(changes.main(sys.argv[1:]))' > "$$root/usr/bin/apppot-snap"
chmod 755 "$$root/sbin/apppot-init" "$$root/usr/bin/apppot-snap"
echo 'ALL ALL=(ALL:ALL) NOPASSWD: ALL' > "$$root/etc/sudoers.d/apppot"
chmod 440 "$$root/etc/sudoers.d/apppot"
echo apppot > "$$root/etc/hostname"
printf '%s\n' '127.0.0.1 localhost apppot' '::1 localhost' > "$$root/etc/hosts"
echo 'nameserver 10.0.2.3' > "$$root/etc/resolv.conf"
base_id=$$(cat /proc/sys/kernel/random/uuid)
echo "$$base_id" > "$$root/var/lib/apppot/base-id"
mke2fs -q -F -t ext4 -L apppot -U "$$base_id" -m 0 -J size=16 \
    -O none,has_journal,ext_attr,resize_inode,dir_index,sparse_super,large_file,huge_file \
    -O filetype,extent,64bit,flex_bg,dir_nlink,extra_isize,metadata_csum \
    -E lazy_itable_init=0,lazy_journal_init=0 -d "$$root" "$$tmp/image" $(IMAGE_SIZE) || {
    echo "make: error: cannot fit $$(du -sm "$$root" | cut -f 1) MiB of files into IMAGE_SIZE=$(IMAGE_SIZE)" >&2
    echo "make: hint: give a larger IMAGE_SIZE, and look at mke2fs's message above" >&2
    exit 1
}
endef

# In a guest, since only there the files have the inode numbers and times by which changes to them are seen.
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

export BOOTSTRAP COMPOSE RECORD

image: $(IMAGE)

mpi-image:
	@$(MAKE) --no-print-directory image IMAGE=build/mpi.img PACKAGES="openmpi-bin python3-mpi4py"

# make's own time stamps cannot tell that a variable changed, and --write changes the image's: so the recipe decides.
$(IMAGE): FORCE deps-build deps-run
	@rootfs_key=$$({ uname -m; echo "$$BOOTSTRAP"; } | sha256sum | cut -c 1-16)
	image_key=$$({ echo "$$rootfs_key $$COMPOSE $$RECORD"; sha256sum $(AGENT); } | sha256sum | cut -c 1-16)
	say() { echo "image: $$*"; }
	die() { echo "make: error: $$1" >&2; echo "make: hint: $$2" >&2; exit 1; }
	is_built() { [ -e $@ ] && [ "$$(cat $@.key 2>/dev/null)" = "$$image_key" ]; }
	if is_built; then say "$@ is up to date"; exit; fi
	[ ! -e $@ ] || [ -e $@.key ] || die "$@ exists and was not made here" "remove it, or give another IMAGE"

	# In a session of its own: when mmdebstrap fails it sends SIGHUP to its process group, else that of make's caller.
	run() {
	    setsid "$$@" &
	    trap "kill -- -$$!; wait $$! || true" HUP INT TERM
	    wait $$!
	    trap - HUP INT TERM
	}

	mkdir -p "$(CACHE)" $(@D)
	cache=$$(cd "$(CACHE)" && pwd)
	export tmp=$$cache/tmp rootfs=$$cache/rootfs-$$rootfs_key.tar
	image=$$cache/image-$$image_key
	# One build at a time; whatever is in $$tmp under the lock was left by a build that was killed.
	exec 9> "$$cache/lock"
	flock -n 9 || { say "waiting for another make image"; flock 9; }
	if is_built; then exit; fi
	$(AS_ROOT) true || die "this machine lets ordinary users have no user namespace to build in" \
	    "run 'sudo make image', or add ranges for $$(id -un) to /etc/subuid and /etc/subgid (man subuid)"
	trap '$(AS_ROOT) rm -rf "$$tmp"' EXIT
	$(AS_ROOT) rm -rf "$$tmp"
	mkdir "$$tmp"

	if [ ! -e "$$rootfs" ] && [ ! -e "$$image" ]; then
	    say "Debian $(SUITE): download and install, a few minutes"
	    mirrors() {
	        apt-get indextargets --format '$$(LABEL) $$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' | sort -u
	    }
	    available=$$(mirrors)
	    if [ -z "$$available$(MIRROR)" ] && [ "$$(id -u)" = 0 ]; then apt-get update; available=$$(mirrors); fi
	    first() { awk -v label="$$1" '$$1 == label { print $$2; exit }' <<< "$$available"; }
	    mirror=$(or $(MIRROR),$$(first Debian))
	    security=$$(first Debian-Security)
	    [ -n "$$mirror" ] || die "apt on this machine knows no Debian mirror" "apt-get update as root, or MIRROR=URL"
	    by=signed-by=/usr/share/keyrings/debian-archive-keyring.gpg
	    echo "deb [$$by] $$mirror $(SUITE) main" > "$$tmp/sources.list"
	    case $(SUITE) in
	    sid | unstable) ;;
	    *)
	        echo "deb [$$by] $$mirror $(SUITE)-updates main"
	        if [ -n "$$security" ]; then echo "deb [$$by] $$security $(SUITE)-security main"; fi ;;
	    esac >> "$$tmp/sources.list"
	    # How this machine's apt reaches its mirrors: proxies, certificates, clocks.
	    export apt_settings=$$(apt-config dump Acquire | grep -E '^Acquire::(https?|ftp|Check-)')
	    run bash -euo pipefail -c "$$BOOTSTRAP"
	    mv "$$tmp/rootfs.tar" "$$rootfs"
	fi
	if [ ! -e "$$image" ]; then
	    say "file system of $(IMAGE_SIZE) with the agent"
	    run $(AS_ROOT) bash -euo pipefail -c "$$COMPOSE"
	    run bash -euo pipefail -c "$$RECORD"
	    mv "$$tmp/image" "$$image"
	fi

	# A copy, as --write on it must not reach the cache. With the same time stamp, as COW files record it.
	cp --reflink=auto --sparse=always --preserve=timestamps "$$image" $@.new
	echo "$$image_key" > $@.key.new
	mv $@.new $@
	mv $@.key.new $@.key
	say "$@: $$(du -m $@ | cut -f 1) MiB on disk"
	# Keep a few of each, the ones last used.
	touch -c -a "$$rootfs" "$$image"
	for kind in rootfs image; do
	    find "$$cache" -maxdepth 1 -name "$$kind-*" -printf '%A@ %p\n' |
	        sort -rn | tail -n +5 | cut -d ' ' -f 2- | xargs -r -d '\n' rm
	done

FORCE:
