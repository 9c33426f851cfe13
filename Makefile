# make demo     show a pod without a pause container on this machine (Debian 12, root or sudo)
# make kind     the same in a kind cluster of two nodes, with kubectl (Docker, kind and kubectl must be there)
# make bench    this shim beside the stock shim and the published Rust shim, measured: more than an hour (BENCH=… takes a part)
# make test     all tests, on containerd 1.6, 1.7 and 2.1 (CONTAINERD_BIN=…, RUNC=…: on others, see tests/README.md)
# make test-vm  only the tests that run in a VM with cgroup v2 and systemd; TESTS=… selects others of the VM's tests
# make faults   the campaign of faults at full size: every system call fails once, SIGKILL at every one, the node's limits,
#               random calls, fuzzers, ten thousand pods: hours (PARTS='binary(campaign)' takes a part)
# make build    the static binary, as target/dist/containerd-shim-pause-v2
# make pause-image  a pause image of a few kB for podsandbox mode, as target/dist/pause-image.tar (NAME=… names it)
# make installer-image  the image of config/deploy/, which installs the shim on the nodes of a cluster, as
#               target/dist/installer-image.tar (INSTALLER=… names it)
# make install  the binary into /usr/local/bin, and the options file unless there is one
# make lint     what CI asks for besides the tests

SHIM     := containerd-shim-pause-v2
TARGET   := $(or $(CARGO_TARGET_DIR),target)
HOST     := $(shell rustc -vV | sed -n 's/^host: //p')
DIST     := target/dist/$(SHIM)
NAME     ?= registry.k8s.io/pause:3.10
INSTALLER ?= containerd-shim-pause-v2/installer:0.1.0
PREFIX   ?= /usr/local
SYSCONF  ?= /etc

# Namespaces, mounts and cgroups need root. cargo builds as the user, and runs the tests and the demo through sudo.
ifneq ($(shell id -u),0)
SUDO := sudo -E
export CARGO_TARGET_$(shell echo $(HOST) | tr a-z- A-Z_)_RUNNER := sudo -E
endif

.PHONY: build demo kind bench test test-vm faults lint pause-image installer-image install clean

build:
	cargo build --release --locked -p shim
	install -D -m 755 $(TARGET)/$(HOST)/release/$(SHIM) $(DIST)
	@ldd $(DIST) 2>&1 | grep -qE 'statically linked|not a dynamic executable' || { echo "$(DIST) is not static" >&2; exit 1; }

demo:
	.ci/setup demo
	tests/lab/prepare
	$(MAKE) build
	cargo build --locked -p shim-tests --bins
	cargo run --quiet --locked -p shim-tests --bin demo

kind:
	.ci/setup demo
	$(MAKE) build
	cargo build --locked -p shim-tests --bins
	# Not as root: Docker, kind and kubectl are the user's.
	$(TARGET)/$(HOST)/debug/kind

# What the bench measures, such as `latency --containerd 2.1 --rounds 10`; empty means everything.
BENCH ?=

bench:
	.ci/setup demo
	$(SUDO) tests/lab/prepare runtimes node
	$(MAKE) build
	cargo build --locked -p shim-tests --bins
	# If this fails, the published shim's column in the report says so.
	-test -x $(PUBLISHED)/bin/containerd-shim-runc-v2-rs || \
	  cargo install --quiet --locked --root $(PUBLISHED) containerd-runc-shim
	cargo run --quiet --locked -p shim-tests --bin bench -- $(BENCH)

PUBLISHED := $(TARGET)/bench/published

test: vm
	$(VM) run cargo nextest run --workspace --locked --profile all

# Runs a command beside the VM, as tests of the binary `vm` need: the VM starts first, and lives as long as the command.
VM    := $(TARGET)/$(HOST)/debug/vm
TESTS ?=

test-vm: vm
	$(VM) run cargo nextest run -p shim-tests --locked --test vm \
	  $(if $(TESTS),--ignore-default-filter -E '$(TESTS)',--profile all)

# The sizes of the campaign of faults; `make test` takes small ones. tests/README.md explains each.
PARTS ?= binary(campaign) + binary(limits) + binary(model) + binary(fuzz) + binary(soak)
SIZES := FAULTS=$(or $(FAULTS),all) LIMITS_LIVES=$(or $(LIMITS_LIVES),50) MODEL_CASES=$(or $(MODEL_CASES),2000) \
  FUZZ_SECONDS=$(or $(FUZZ_SECONDS),60) SOAK_PODS=$(or $(SOAK_PODS),10000)

faults:
	.ci/setup test
	tests/lab/prepare
	$(MAKE) build
	cargo build --locked -p shim-tests --bins
	$(SUDO) rm -rf $(TARGET)/faults
	$(SIZES) cargo nextest run -p shim-tests --locked --profile faults -E '$(PARTS)'; \
	  status=$$?; cat $(TARGET)/faults/*.txt; exit $$status

.PHONY: vm
vm:
	.ci/setup test
	$(SUDO) tests/lab/prepare runtimes docker node vm
	# Without criu, the tests of checkpoints are left out, and say so.
	-tests/lab/prepare criu
	$(MAKE) build
	cargo build --locked -p shim-tests --bins

lint:
	.ci/setup lint
	cargo fmt --all --check
	target/tools/typos/bin/typos
	git grep -lIE '^#!.*sh$$' | xargs shellcheck
	cargo machete
	cargo deny --workspace --locked check --hide-inclusion-graph bans licenses sources
	cargo clippy --workspace --all-targets --locked -- -D warnings

pause-image:
	mkdir -p target/dist
	cargo run --quiet --locked -p shim-tests --bin images -- pause $(NAME) target/dist/pause-image.tar

installer-image: build
	cargo run --quiet --locked -p shim-tests --bin images -- installer $(INSTALLER) target/dist/installer-image.tar $(DIST)

# Run `make build` as yourself first: root may have no Rust.
install:
	install -D -m 755 $(DIST) $(DESTDIR)$(PREFIX)/bin/$(SHIM)
	test -e $(DESTDIR)$(SYSCONF)/$(SHIM)/config.toml || \
	  install -D -m 644 config/pause.toml $(DESTDIR)$(SYSCONF)/$(SHIM)/config.toml

clean:
	cargo clean
