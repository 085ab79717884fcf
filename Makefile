# All commands of the project. `make` alone lists them.

PREFIX  ?= /usr/local
DESTDIR ?=
CARGO   ?= cargo
# What `install-files` installs.
PROGRAM ?= target/release/driftd
# How long each fuzz target runs.
FUZZ_SECONDS ?= 60
# How long containers drift in `make soak`.
SOAK_SECONDS ?= 3600
bindir     = $(PREFIX)/bin
mandir     = $(PREFIX)/share/man/man1
docdir     = $(PREFIX)/share/doc/driftd
profiledir = $(PREFIX)/share/driftd/baselines
unitdir    = $(PREFIX)/lib/systemd/system
# Programs that hooks can name.
hookdir    = $(PREFIX)/libexec/driftd
# driftd looks for its settings here, whatever the prefix is.
confdir    = /etc/driftd
# Whether what is installed is for the systemd that runs here.
SYSTEMD    = [ -z "$(DESTDIR)" ] && [ -d /run/systemd/system ]
# Below DESTDIR, `make` writes without sudo.
INSTALLER  = $(if $(DESTDIR),,$(SUDO))

export PATH := $(PATH):$(HOME)/.cargo/bin

# Building needs no root; installing packages and running containers does. So call `make`
# as the user who builds; it runs sudo where it needs root.
SUDO   := $(if $(filter-out 0,$(shell id -u)),sudo)
AS_ROOT = $(if $(SUDO),--config 'target."cfg(unix)".runner = "sudo --preserve-env"')
# The same, with programs of another version: sudo has a PATH of its own.
AS_ROOT_WITH = $(if $(SUDO),--config 'target."cfg(unix)".runner = "sudo --preserve-env env PATH=$(1)"')

# Other versions of containerd and Docker, and a distribution to make an image of. They are
# unpacked here, not installed.
ENGINES = $(CURDIR)/target/engines

.DEFAULT_GOAL := help
.PHONY: help setup setup-kernels build test race test-matrix test-docker test-checkpoint test-systemd test-systemd-vm test-kernels soak corpus check bench bench-against fuzz demo install install-files uninstall clean

help: ## lists these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## installs what building and testing need and this machine lacks (Debian or Ubuntu)
	@command -v $(CARGO) >/dev/null || { \
		echo "Rust is not installed: see https://rustup.rs (rust-toolchain.toml names the version)" >&2; exit 1; }
	@scripts/setup --check || $(SUDO) scripts/setup

build: ## builds driftd for development
	$(CARGO) build --locked

test: setup ## installs what is missing and runs every test (as root: containers are started)
	$(CARGO) test --locked $(AS_ROOT)

race: setup ## a hundred thousand rounds each against the free gate and against a rule that denies, ten thousand against files that are read later (as root, two hours)
	DRIFTD_RACE_TIMES=30 $(CARGO) test --locked $(AS_ROOT) --test free_gate -- --test-threads=1 --nocapture --include-ignored changed_bytes
	$(CARGO) test --locked $(AS_ROOT) --test check -- --nocapture --include-ignored never_silent
	$(CARGO) test --locked $(AS_ROOT) --test node -- --nocapture --include-ignored never_does_a_program_last

test-matrix: setup matrix-1.7 matrix-2.1 ## runs the tests that need containerd with 1.7 and 2.1, and with a whole distribution's image (as root)

$(ENGINES)/containerd-1.7: ; @scripts/other-release trixie $@ containerd
$(ENGINES)/containerd-2.1: ; @scripts/other-release sid $@ containerd
$(ENGINES)/distribution.tar: ; @$(SUDO) scripts/distribution $@

matrix-%: $(ENGINES)/containerd-% $(ENGINES)/distribution.tar
	$</usr/bin/containerd --version
	PATH="$</usr/bin:$$PATH" DRIFTD_REAL_IMAGE=$(ENGINES)/distribution.tar \
		$(CARGO) test --locked $(call AS_ROOT_WITH,$</usr/bin:$(PATH)) --test containerd --test node

test-docker: setup docker-20.10 docker-newest ## runs the tests with Docker 20.10 and the newest available, and both kinds of storage (as root)

$(ENGINES)/docker-20.10: ; @scripts/other-release bookworm $@ docker.io
$(ENGINES)/docker-newest: ; @scripts/other-release sid $@ docker.io docker-cli

# Docker 20.10 has no store of containerd's images.
docker-20.10: TESTS = docker_with_overlay2
docker-newest: TESTS = docker

docker-%: $(ENGINES)/docker-%
	$</usr/sbin/dockerd --version
	DRIFTD_TEST_DOCKER=$</usr $(CARGO) test --locked $(AS_ROOT) --test node -- $(TESTS) --ignored

# Debian 12's CRIU does not understand the newest kernels.
CRIU = criu libc6 libbsd0 libedit2 libffi8 libgmp10 libgnutls30t64 libhogweed6t64 libidn2-0 \
	libjansson4 libmd0 libmnl0 libnet1 libnettle8t64 libnftables1 libnftnl11 libnl-3-200 \
	libp11-kit0 libprotobuf-c1 libtasn1-6 libtinfo6 libunistring5 libuuid1

test-checkpoint: setup $(ENGINES)/criu/bin/criu ## runs the tests with a container that CRIU has restored from a checkpoint (as root)
	$(ENGINES)/criu/bin/criu check
	PATH="$(ENGINES)/criu/bin:$$PATH" $(CARGO) test --locked \
		$(call AS_ROOT_WITH,$(ENGINES)/criu/bin:$(PATH)) --test node -- d05 --ignored

$(ENGINES)/criu/bin/criu:
	@scripts/other-release trixie $(ENGINES)/criu $(CRIU)
	@mkdir -p $(@D)
	@libraries=$$(dirname $(ENGINES)/criu/usr/lib/*/libc.so.6) && printf '#!/bin/sh\nexec %s "$$@"\n' \
		"$$(echo $$libraries/ld-linux*) --library-path $$libraries $(ENGINES)/criu/usr/sbin/criu" > $@
	@chmod 0755 $@

# `make test` has a short form, under this machine's systemd.
test-systemd: setup systemd-bookworm systemd-trixie ## the installed unit under Debian 12's systemd (252) and Debian 13's (257) (as root)

$(ENGINES)/machine-bookworm/.complete: scripts/machine-root ; @$(SUDO) scripts/machine-root bookworm $(@D)
$(ENGINES)/machine-trixie/.complete: scripts/machine-root ; @$(SUDO) scripts/machine-root trixie $(@D)

systemd-%: $(ENGINES)/machine-%/.complete
	DRIFTD_MACHINE_ROOT=$(ENGINES)/machine-$* \
		$(CARGO) test --locked $(AS_ROOT) --test node -- installed_unit --include-ignored --skip reboot

# One machine at a time: its processors may be emulated, which takes all of this machine's.
test-systemd-vm: setup-kernels vm-bookworm ## the same in a virtual machine, on Debian 12's own kernel, and its reboot (as root)

vm-%: $(ENGINES)/machine-%/.complete
	DRIFTD_MACHINE_ROOT=$(ENGINES)/machine-$* DRIFTD_MACHINE_KERNEL=$* \
		$(CARGO) test --locked $(AS_ROOT) --test node -- installed_unit --include-ignored --test-threads=1

# The release that ordinary work is compared with.
RELEASED = 9da8f86

$(ENGINES)/corpus.tar: ; @$(SUDO) scripts/corpus-image $@

# $(call build-older,REVISION,DIRECTORY): a release build of another revision.
define build-older
	mkdir -p $(2)
	git archive $(1) | tar -x -C $(2)
	cd $(2) && CARGO_TARGET_DIR=$(CURDIR)/target $(CARGO) build --locked --release --bin driftd
	cp target/release/driftd $(2)/driftd
endef

$(CURDIR)/target/against/$(RELEASED)/driftd: ; $(call build-older,$(RELEASED),$(@D))

corpus: setup $(ENGINES)/corpus.tar $(CURDIR)/target/against/$(RELEASED)/driftd ## twelve kinds of ordinary work, and what 0.1.0 and this tree report of them (as root, 75 minutes)
	$(CARGO) build --locked --release --bin driftd
	DRIFTD_PROGRAM=$(CURDIR)/target/release/driftd CORPUS_IMAGE=$(ENGINES)/corpus.tar \
		CORPUS_AGAINST=$(CURDIR)/target/against/$(RELEASED)/driftd \
		$(CARGO) test --locked $(AS_ROOT) --test node -- corpus --exact --ignored --nocapture

soak: setup ## random drift while everything is stopped and killed, SOAK_SECONDS (3600) long (as root)
	$(CARGO) test --locked $(AS_ROOT) --test node -- x02_a_thread_that_cannot_be_replaced --ignored
	SOAK_SECONDS=$(SOAK_SECONDS) $(CARGO) test --locked $(AS_ROOT) --test node -- chaos_soak --ignored --nocapture

# No test is left out: the tests expect that an older kernel lacks some features. Needs no
# root, because the machine is a virtual one.
test-kernels: setup-kernels kernel-bookworm kernel-bullseye ## runs tests/kernel.rs on Linux 6.1 and 5.10, in virtual machines

setup-kernels: setup
	@PATH=$$PATH:/usr/sbin:/sbin; command -v qemu-system-x86_64 >/dev/null && \
		command -v mke2fs >/dev/null && command -v depmod >/dev/null || \
		$(SUDO) apt-get install -y -qq --no-install-recommends qemu-system-x86 e2fsprogs kmod

kernel-%:
	$(CARGO) test --locked --test kernel \
		--config 'target."cfg(unix)".runner = "$(CURDIR)/scripts/test-kernel $*"' -- --test-threads=2

check: ## format, lints and dependencies
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- --deny warnings
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
		$(CARGO) deny --offline check bans licenses sources; \
	else \
		echo "dependencies were not checked: cargo-deny is missing (cargo install --locked cargo-deny)"; \
	fi

bench: setup ## measures the figures of docs/performance.md on this machine (as root)
	$(CARGO) bench --locked $(AS_ROOT)

# `name` is its name in the table.
bench-against: name ?= $(REV)
bench-against: OLDER = $(CURDIR)/target/against/$(REV)
bench-against: setup ## what attacks cost a neighbour, beside the driftd of another revision (REV=..., as root)
	@test -n "$(REV)" || { echo "which revision? make bench-against REV=..." >&2; exit 1; }
	$(call build-older,$(REV),$(OLDER))
	DRIFTD_BENCH_AGAINST=$(OLDER)/driftd DRIFTD_BENCH_AGAINST_NAME="$(name)" \
		$(CARGO) bench --locked $(AS_ROOT) --bench hostile

# libFuzzer needs compiler flags that a stable compiler takes only with RUSTC_BOOTSTRAP=1.
fuzz: ## random bytes for every reader of hostile input, FUZZ_SECONDS (60) each
	@$(CARGO) fuzz --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-fuzz
	@for target in layer_stream baseline_file oci_documents; do \
		mkdir -p fuzz/corpus/$$target && \
		RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run --sanitizer none $$target \
			fuzz/corpus/$$target fuzz/seeds/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -timeout=20 -print_final_stats=1 || exit 1; \
	done

demo: setup ## drift in a container and what driftd reports about it, in under a minute (as root)
	$(CARGO) build --locked
	@$(SUDO) scripts/demo

install: ## installs a release build, the unit, the settings, the man pages and completions
	$(CARGO) build --locked --release
	$(INSTALLER) $(MAKE) --no-print-directory install-files PREFIX=$(PREFIX) DESTDIR=$(DESTDIR)

install-files:
	install -D -m 0755 $(PROGRAM) $(DESTDIR)$(bindir)/driftd
	install -d $(DESTDIR)$(unitdir) $(DESTDIR)$(confdir) $(DESTDIR)$(mandir) $(DESTDIR)$(docdir)
	@# The unit of the hooks is off until an administrator enables it.
	for unit in driftd driftd-hooks; do \
		sed -e 's|/usr/bin/driftd|$(bindir)/driftd|' -e 's|/usr/share/doc/driftd|$(docdir)|' systemd/$$unit.service > $(DESTDIR)$(unitdir)/$$unit.service && \
		chmod 0644 $(DESTDIR)$(unitdir)/$$unit.service || exit 1; \
	done
	install -d $(DESTDIR)$(hookdir)
	install -m 0755 contrib/hooks/kubernetes-delete-pod/kubernetes-delete-pod contrib/hooks/containerd-recreate/containerd-recreate $(DESTDIR)$(hookdir)/
	install -d $(DESTDIR)$(profiledir)
	install -m 0644 baselines/*.toml $(DESTDIR)$(profiledir)/
	@# Settings that were edited stay.
	@sed -e 's|/usr/share/driftd/baselines|$(profiledir)|' systemd/driftd.toml > $(DESTDIR)$(confdir)/driftd.toml.new
	@chmod 0644 $(DESTDIR)$(confdir)/driftd.toml.new
	@if [ -e $(DESTDIR)$(confdir)/driftd.toml ] && ! cmp -s $(DESTDIR)$(confdir)/driftd.toml.new $(DESTDIR)$(confdir)/driftd.toml; then \
		echo "kept $(DESTDIR)$(confdir)/driftd.toml; the shipped settings are beside it, as driftd.toml.new"; \
	else \
		mv $(DESTDIR)$(confdir)/driftd.toml.new $(DESTDIR)$(confdir)/driftd.toml; \
	fi
	$(PROGRAM) man --directory $(DESTDIR)$(mandir)
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions \
		$(DESTDIR)$(PREFIX)/share/zsh/site-functions \
		$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	$(PROGRAM) completions bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/driftd
	$(PROGRAM) completions zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_driftd
	$(PROGRAM) completions fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/driftd.fish
	install -m 0644 README.md SECURITY.md LICENSE docs/*.md $(DESTDIR)$(docdir)/
	for hook in kubernetes-delete-pod containerd-recreate; do \
		install -m 0644 contrib/hooks/$$hook/README.md $(DESTDIR)$(docdir)/hook-$$hook.md || exit 1; \
	done
	@if $(SYSTEMD) && systemctl --quiet is-active driftd; then \
		echo "installed; the old program still runs; next: systemctl daemon-reload && systemctl try-restart driftd driftd-hooks"; \
	else \
		echo "installed; next: systemctl daemon-reload && systemctl enable --now driftd"; \
	fi

uninstall: ## stops and disables driftd, removes what install has installed, keeps settings and history
	@if $(SYSTEMD); then for unit in driftd-hooks driftd; do \
		[ ! -e $(unitdir)/$$unit.service ] || $(INSTALLER) systemctl disable --now $$unit || exit 1; \
	done; fi
	$(INSTALLER) rm -f $(DESTDIR)$(bindir)/driftd $(DESTDIR)$(unitdir)/driftd.service $(DESTDIR)$(unitdir)/driftd-hooks.service $(DESTDIR)$(mandir)/driftd.1 $(DESTDIR)$(mandir)/driftd-*.1 \
		$(DESTDIR)$(PREFIX)/share/bash-completion/completions/driftd \
		$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_driftd \
		$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/driftd.fish
	$(INSTALLER) rm -rf $(DESTDIR)$(docdir) $(DESTDIR)$(PREFIX)/share/driftd $(DESTDIR)$(hookdir)
	@if $(SYSTEMD); then $(INSTALLER) systemctl daemon-reload; fi
	@echo "kept: $(DESTDIR)$(confdir) and $(DESTDIR)/var/lib/driftd"

clean: ## removes what was built
	$(CARGO) clean
