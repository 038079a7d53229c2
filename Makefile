# Two of these do everything: make demo, and (as root) make test.
# "make help" lists them all.

# sudo often drops the folder that Go lives in.
export PATH := $(PATH):/usr/local/go/bin:/usr/lib/go/bin:/usr/sbin:/sbin
# A checkout that belongs to somebody else would stop a build as root.
export GOFLAGS ?= -buildvcs=false

GO          ?= go
STATICCHECK ?= honnef.co/go/tools/cmd/staticcheck@v0.8.2
VERSION     ?= $(or $(shell git describe --tags --always --dirty 2>/dev/null),devel)
FUZZTIME    ?= 10s

# Where install puts things. DESTDIR is for packagers.
DESTDIR    ?=
SBINDIR    ?= /usr/sbin
MANDIR     ?= /usr/share/man
SYSCONFDIR ?= /etc
UNITDIR    ?= /lib/systemd/system
COMPDIR    ?= /usr/share
SYSUSERSDIR ?= /usr/lib/sysusers.d
TMPFILESDIR ?= /usr/lib/tmpfiles.d
SYSCTLDIR  ?= /usr/lib/sysctl.d
INSTALL    ?= install

.DEFAULT_GOAL := help
.PHONY: help build demo test lint fuzz bench install packages clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build bin/tproxyd
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/tproxyd ./cmd/tproxyd

demo: build ## show the main job in namespaces, in under a minute (root or user namespaces)
	bin/tproxyd demo

test: ## install what the tests need and run them all (as root, Debian or Ubuntu)
	GO='$(GO)' STATICCHECK='$(STATICCHECK)' FUZZTIME='$(FUZZTIME)' test/run

lint: ## gofmt, go vet, staticcheck, go mod tidy, import table, docs, man pages, units
	GO='$(GO)' STATICCHECK='$(STATICCHECK)' test/run lint

fuzz: ## run each fuzz target for FUZZTIME (10s)
	GO='$(GO)' FUZZTIME='$(FUZZTIME)' test/run fuzz

bench: build ## measure beside plain forwarding and a bare splice relay (as root, under five minutes)
	$(GO) run ./bench -tproxyd bin/tproxyd

packages: ## make deb, rpm, apk, ipk and static binaries in bin/packages, the same every time
	GO='$(GO)' VERSION='$(VERSION)' deploy/package/build $(ARCHS)

install: build ## install into DESTDIR: binary, units, man pages, completion, examples of the files
	$(INSTALL) -d '$(DESTDIR)$(SBINDIR)' '$(DESTDIR)$(UNITDIR)' '$(DESTDIR)$(SYSCTLDIR)' \
		'$(DESTDIR)$(MANDIR)/man8' '$(DESTDIR)$(MANDIR)/man5' '$(DESTDIR)$(SYSCONFDIR)/tproxyd' \
		'$(DESTDIR)$(SYSUSERSDIR)' '$(DESTDIR)$(TMPFILESDIR)' '$(DESTDIR)$(COMPDIR)/bash-completion/completions' \
		'$(DESTDIR)$(COMPDIR)/zsh/site-functions' '$(DESTDIR)$(COMPDIR)/fish/vendor_completions.d'
	$(INSTALL) -m 755 bin/tproxyd '$(DESTDIR)$(SBINDIR)/tproxyd'
	$(INSTALL) -m 644 deploy/tproxyd.service deploy/tproxyd-closed.service deploy/tproxyd-attach@.service '$(DESTDIR)$(UNITDIR)/'
	$(INSTALL) -m 644 deploy/90-tproxyd.conf '$(DESTDIR)$(SYSCTLDIR)/90-tproxyd.conf'
	$(INSTALL) -m 644 man/tproxyd.8 '$(DESTDIR)$(MANDIR)/man8/'
	$(INSTALL) -m 644 man/tproxyd.toml.5 man/tproxyd-socks.cnf.5 '$(DESTDIR)$(MANDIR)/man5/'
	$(INSTALL) -m 644 deploy/tproxyd.sysusers '$(DESTDIR)$(SYSUSERSDIR)/tproxyd.conf'
	$(INSTALL) -m 644 deploy/tproxyd.tmpfiles '$(DESTDIR)$(TMPFILESDIR)/tproxyd.conf'
	bin/tproxyd completion bash >'$(DESTDIR)$(COMPDIR)/bash-completion/completions/tproxyd'
	bin/tproxyd completion zsh >'$(DESTDIR)$(COMPDIR)/zsh/site-functions/_tproxyd'
	bin/tproxyd completion fish >'$(DESTDIR)$(COMPDIR)/fish/vendor_completions.d/tproxyd.fish'
	test -n '$(DESTDIR)' || ! command -v systemd-sysusers >/dev/null || systemd-sysusers tproxyd.conf
	for f in tproxyd.toml socks.cnf; do \
		$(INSTALL) -m 644 deploy/$$f '$(DESTDIR)$(SYSCONFDIR)/tproxyd/'$$f.example; \
		test -e '$(DESTDIR)$(SYSCONFDIR)/tproxyd/'$$f || \
		$(INSTALL) -m 644 deploy/$$f '$(DESTDIR)$(SYSCONFDIR)/tproxyd/'$$f; \
	done

clean: ## remove what was built
	rm -rf bin
