# One front door. `make` alone says what there is.

PREFIX  ?= /usr/local
DESTDIR ?=
CARGO   ?= cargo
bindir     = $(PREFIX)/bin
mandir     = $(PREFIX)/share/man/man1
docdir     = $(PREFIX)/share/doc/driftd
# systemd and driftd look for these here, whatever the prefix is.
unitdir    = /usr/lib/systemd/system
confdir    = /etc/driftd

# sudo has its own PATH; the toolchain of whoever called it is found all the same.
export PATH := $(PATH):$(HOME)/.cargo/bin

.DEFAULT_GOAL := help
.PHONY: help setup build test check bench demo install uninstall clean

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## installs what building and testing need and this machine lacks (root, Debian or Ubuntu)
	@scripts/setup

build: ## builds driftd for development
	$(CARGO) build --locked

test: setup ## installs what is missing and runs every test (root: containers are started)
	$(CARGO) test --locked

check: ## format, lints and dependencies
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- --deny warnings
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
		$(CARGO) deny --offline check bans licenses sources; \
	else \
		echo "dependencies were not checked: cargo-deny is missing (cargo install --locked cargo-deny)"; \
	fi

bench: setup ## the README's numbers, measured on this machine (root)
	$(CARGO) bench --locked

demo: setup ## drift in a container and what driftd says about it, in under a minute (root)
	$(CARGO) build --locked
	@scripts/demo

install: ## installs a release build, the unit, the settings, the man page and completions
	$(CARGO) build --locked --release
	install -D -m 0755 target/release/driftd $(DESTDIR)$(bindir)/driftd
	install -d $(DESTDIR)$(unitdir) $(DESTDIR)$(confdir) $(DESTDIR)$(mandir) $(DESTDIR)$(docdir)
	sed 's|/usr/bin/driftd|$(bindir)/driftd|' systemd/driftd.service > $(DESTDIR)$(unitdir)/driftd.service
	chmod 0644 $(DESTDIR)$(unitdir)/driftd.service
	@# Settings that somebody has edited are theirs.
	@if [ -e $(DESTDIR)$(confdir)/driftd.toml ] && ! cmp -s systemd/driftd.toml $(DESTDIR)$(confdir)/driftd.toml; then \
		install -m 0644 systemd/driftd.toml $(DESTDIR)$(confdir)/driftd.toml.new; \
		echo "kept $(DESTDIR)$(confdir)/driftd.toml; the shipped settings are beside it, as driftd.toml.new"; \
	else \
		install -m 0644 systemd/driftd.toml $(DESTDIR)$(confdir)/driftd.toml; \
	fi
	target/release/driftd man > $(DESTDIR)$(mandir)/driftd.1
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions \
		$(DESTDIR)$(PREFIX)/share/zsh/site-functions \
		$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	target/release/driftd completions bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/driftd
	target/release/driftd completions zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_driftd
	target/release/driftd completions fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/driftd.fish
	install -m 0644 README.md SECURITY.md LICENSE docs/*.md $(DESTDIR)$(docdir)/
	@echo "installed; next: systemctl daemon-reload && systemctl enable --now driftd"

uninstall: ## removes what install has put there, and keeps settings and history
	rm -f $(DESTDIR)$(bindir)/driftd $(DESTDIR)$(unitdir)/driftd.service $(DESTDIR)$(mandir)/driftd.1 \
		$(DESTDIR)$(PREFIX)/share/bash-completion/completions/driftd \
		$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_driftd \
		$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/driftd.fish
	rm -rf $(DESTDIR)$(docdir)
	@echo "kept: $(DESTDIR)$(confdir) and $(DESTDIR)/var/lib/driftd"

clean: ## removes what was built
	$(CARGO) clean
