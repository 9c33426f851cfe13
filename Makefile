# make demo     show a pod without a pause container on this machine (Debian 12, root or sudo)
# make kind     the same in a kind cluster of two nodes, with kubectl (Docker, kind and kubectl must be there)
# make bench    this shim beside the stock shim and the published Rust shim, measured: more than an hour (BENCH=… takes a part)
# make test     all tests, on containerd 1.6, 1.7 and 2.1 (CONTAINERD_BIN=…, RUNC=…: on others, see tests/README.md)
# make test-vm  only the tests that run in a VM with cgroup v2 and systemd; TESTS=… selects others of the VM's tests
# make faults   the campaign of faults at full size: every system call fails once, SIGKILL at every one, the node's limits,
#               random calls, fuzzers, ten thousand pods: hours (PARTS='binary(campaign)' takes a part)
# make test-arm64  the arm64 build, in a VM of that kind: all unit tests, and pods of every kind (TESTS=… selects)
# make build    the static binary, as target/dist/containerd-shim-pause-v2 (TARGET=aarch64-unknown-linux-gnu: for arm64, as
#               target/dist/aarch64-unknown-linux-gnu/containerd-shim-pause-v2)
# make pause-image  a pause image of a few kB for podsandbox mode, as target/dist/pause-image.tar (NAME=… names it)
# make deb      the Debian package; make release: the package, a tarball, a bill of materials, checksums, in target/dist
#               (TARGET=aarch64-unknown-linux-gnu: for arm64)
# make reproducible   builds the release again in another folder, and compares
# make test-package   installs, upgrades and purges the package on a clean Debian 12 and 13
# make installer-image  the image of config/deploy/, which installs the shim on the nodes of a cluster, as
#               target/dist/installer-image.tar (INSTALLER=… names it)
# make install  the binary into /usr/local/bin, and the options file unless there is one
# make docs     these pages as a book, as target/docs/index.html
# make lint     what CI asks for besides the tests
# make advisories     known faults of the crates (ADVISORY_DB=… without a network)

SHIM     := containerd-shim-pause-v2
FOLDER   := $(or $(CARGO_TARGET_DIR),target)
HOST     := $(shell rustc -vV | sed -n 's/^host: //p')
TARGET   ?= $(HOST)
DIST     := target/dist/$(SHIM)
NAME     ?= registry.k8s.io/pause:3.10
INSTALLER ?= localhost/containerd-shim-pause-v2/installer:0.1.0
PREFIX   ?= /usr/local
SYSCONF  ?= /etc

# Namespaces, mounts and cgroups need root. cargo builds as the user, and runs the tests and the demo through sudo.
ifneq ($(shell id -u),0)
SUDO := sudo -E
export CARGO_TARGET_$(shell echo $(HOST) | tr a-z- A-Z_)_RUNNER := sudo -E
endif

# For another machine than this one: Debian's cross compiler links.
ifneq ($(TARGET),$(HOST))
DIST := target/dist/$(TARGET)/$(SHIM)
export CARGO_TARGET_$(shell echo $(TARGET) | tr a-z- A-Z_)_LINKER := $(firstword $(subst -, ,$(TARGET)))-linux-gnu-gcc
endif

.PHONY: build demo kind bench test test-vm test-arm64 faults lint docs pause-image installer-image install clean deb release reproducible test-package advisories

# rustc writes the paths of sources into the binary, for messages of panics. These stand there instead, so that the
# binary is the same from every folder. Not in .cargo/config.toml, which cannot name the folder that it lies in.
REMAP := --config 'target."cfg(all(target_os = \"linux\", target_env = \"gnu\"))".rustflags = [ \
  "--remap-path-prefix=$(CURDIR)=/src", "--remap-path-prefix=$(abspath $(FOLDER))=/src/target", \
  "--remap-path-prefix=$(abspath $(or $(CARGO_HOME),$(HOME)/.cargo))=/cargo" ]'

build:
	SHIM_COMMIT=$$(packaging/commit) cargo build --release --locked -p shim --target $(TARGET) $(REMAP)
	install -D -m 755 $(FOLDER)/$(TARGET)/release/$(SHIM) $(DIST)
	@readelf -lW $(DIST) | awk '/INTERP/ { dynamic = 1 } /LOAD/ { loads = 1 } END { exit dynamic || !loads }' || \
	  { echo "$(DIST) is not static" >&2; exit 1; }

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
	$(FOLDER)/$(HOST)/debug/kind

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

PUBLISHED := $(FOLDER)/bench/published

test: vm
	$(VM) run cargo nextest run --workspace --locked --profile all

# Runs a command beside the VM, as tests of the binary `vm` need: the VM starts first, and lives as long as the command.
VM    := $(FOLDER)/$(HOST)/debug/vm
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
	$(SUDO) rm -rf $(FOLDER)/faults
	$(SIZES) cargo nextest run -p shim-tests --locked --profile faults -E '$(PARTS)'; \
	  status=$$?; cat $(FOLDER)/faults/*.txt; exit $$status

# The arm64 build is tested as the other one is, but all tests run in a VM: cargo's runner brings each one there.
ARM64        := aarch64-unknown-linux-gnu
ARM64_LAB    := $(abspath $(FOLDER))/lab-arm64
ARM64_SUITES := vm s1_sharing user_namespaces logs
# The pause crate's own.
ARM64_SUITES += process program refusals sandbox user waiter

test-arm64:
	.ci/setup arm64
	$(SUDO) env LAB_ARCH=arm64 LAB_DIR=$(ARM64_LAB) tests/lab/prepare runtimes vm
	$(MAKE) build TARGET=$(ARM64)
	cargo build --locked -p shim-tests --bin vm
	$(MAKE) test-arm64-in-vm TARGET=$(ARM64)

# Called with TARGET, for the linker.
.PHONY: test-arm64-in-vm
test-arm64-in-vm: export LAB_DIR := $(ARM64_LAB)
test-arm64-in-vm: export SHIM_BINARY := $(abspath target/dist/$(ARM64)/$(SHIM))
test-arm64-in-vm: export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER := $(abspath $(VM)) exec
test-arm64-in-vm:
	cargo build --locked -p shim-tests --bins --target $(TARGET)
	$(VM) run cargo nextest run -p pause -p shim -p shim-tests --locked --target $(TARGET) \
	  --lib $(addprefix --test ,$(ARM64_SUITES)) --profile arm64 $(if $(TESTS),--ignore-default-filter -E '$(TESTS)')

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
	git grep -lIE '^#!.*sh$$' | xargs shellcheck --external-sources
	cargo machete
	cargo deny --workspace --locked check --hide-inclusion-graph bans licenses sources
	cargo clippy --workspace --all-targets --locked -- -D warnings

# The book has the folders of the project, so that a link between two pages is the same in both. mdBook wants the list of
# the chapters at the top.
docs:
	.ci/setup docs
	rm -rf target/book target/docs
	mkdir -p target/book/src
	cp docs/book/* target/book
	git ls-files -z --cached --others --exclude-standard -- '*.md' config docs/bench.svg | \
	  xargs -0 cp --parents -t target/book/src
	sed -E 's#\]\(#&docs/#; s#\(docs/\.\./#(#' docs/SUMMARY.md > target/book/src/SUMMARY.md
	target/tools/mdbook/bin/mdbook build target/book

pause-image:
	.ci/setup demo
	mkdir -p target/dist
	cargo run --quiet --locked -p shim-tests --bin images -- pause $(NAME) target/dist/pause-image.tar

installer-image: build
	.ci/setup demo
	cargo run --quiet --locked -p shim-tests --bin images -- installer $(INSTALLER) target/dist/installer-image.tar $(DIST)

deb: build
	.ci/setup package
	packaging/deb/build $(TARGET) $(DIST) target/dist

release: build
	.ci/setup package
	packaging/release $(TARGET) $(DIST) target/dist

reproducible: release
	packaging/reproducible $(TARGET)

test-package: deb
	packaging/deb/check target/dist/*_$(shell dpkg --print-architecture).deb
	$(SUDO) packaging/deb/test target/dist/*_$(shell dpkg --print-architecture).deb

# The database of advisories is not part of this project. cargo-deny clones it by git; ADVISORY_DB names a clone that is
# there already, such as a mirror's.
advisories:
	.ci/setup lint
	packaging/advisories $(ADVISORY_DB)

# Run `make build` as yourself first: root may have no Rust.
install:
	install -D -m 755 $(DIST) $(DESTDIR)$(PREFIX)/bin/$(SHIM)
	test -e $(DESTDIR)$(SYSCONF)/$(SHIM)/config.toml || \
	  install -D -m 644 config/pause.toml $(DESTDIR)$(SYSCONF)/$(SHIM)/config.toml

clean:
	cargo clean
