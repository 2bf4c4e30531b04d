# make demo     run the quickstart into outputs/quickstart
# make bench    run the benchmarks into outputs/benchmarks
# make test     check that everything is in step, run every notebook, run the tests
# make quick    in step? linter and the quick tests: two minutes, before each commit
# make lint     what ruff says; make types: what mypy says
# make export   clean the notebooks and write lagm/ from them
# make readme   write README.md from nbs/index.ipynb
# make constraints  write .ci/constraints anew: the newest packages, and the lowest that settings.ini promises
# make docs     build the site into _docs/html: book, reference, results, API
# make clean    remove what was built (neither outputs/ nor .venv/)
#
# The first use installs the package into the active virtual or conda environment, or makes .venv if
# there is none. Another Python: make demo PYTHON=python3.12

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo bench test quick sync lint types notebooks unit export readme docs constraints clean kernels install \
	install-dev install-docs

CONDA := $(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX))
ENV := $(or $(VIRTUAL_ENV),$(CONDA),$(CURDIR)/.venv)
RUN := PATH="$(ENV)/bin:$$PATH"
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -13

demo: install
	@$(RUN) lagm run quickstart

bench: install
	@set -e; for notebook in nbs/benchmarks/*.ipynb; do name=$$(basename "$$notebook" .ipynb); \
		$(RUN) lagm run "$$notebook" -o "outputs/benchmarks/$$name" --force; done

test: sync notebooks unit

# Slow tests are those that tests/conftest.py names.
quick: sync lint
	@$(RUN) $(ONE_THREAD) python -m pytest -q -n 2 --dist loadfile -m "not slow" tests

lint: install-dev
	@$(RUN) ruff check

types: install-dev
	@$(RUN) mypy

# Cleaning, exporting and the README must change nothing.
sync: install-dev
	@$(RUN) python tests/sync.py

# One thread per worker: two notebooks that each use both cores take longer than one after the other.
# The quickstart as it stands trains for a minute or two, for people; tests/test_quickstart.py runs it at a small size.
notebooks: install-dev
	@$(RUN) $(ONE_THREAD) nbdev_test --path nbs --skip_file_glob quickstart.ipynb --n_workers 2 --do_print --timing

# Two workers, a file of tests in one of them: most tests wait for processes, and one thread each is enough.
unit: install-dev
	@$(RUN) $(ONE_THREAD) python -m pytest -q -n 2 --dist loadfile tests

export: install-dev
	@$(RUN) nbdev_clean
	@$(RUN) python tests/export.py

readme: install-dev
	@$(RUN) python -m lagm.experiments.readme

# For the oldest Python that the kit knows. The comment at the head of each file stays.
PIN := uv pip compile setup.py --extra dev --extra lab --python-version 3.11 --no-emit-index-url --no-emit-find-links \
	--no-annotate --no-header -q
constraints: install-dev
	@$(RUN) python -m pip install -q uv
	@$(RUN) sh -ec 'for kind in highest:records lowest-direct:lowest; do file=.ci/constraints/$${kind#*:}.txt; \
		head -1 $$file > $$file.new; $(PIN) --resolution $${kind%:*} >> $$file.new; mv $$file.new $$file; done'

# Warnings, links to nothing, and whatever a page would load from the network, are errors.
docs: install-docs
	@$(RUN) python nbs/site/build.py

clean:
	rm -rf build dist _proc _docs .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find lagm nbs tests -name __pycache__ -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +
	find nbs -name .last_checked -delete

# ---- installing
# A stamp in the environment remembers which checkout is installed and with which extras; it is out of
# date when settings.ini or setup.py are newer. $(1): the extras, $(2): stamps that will do as well
define ensure
	@set -eu; \
	if [ ! -x "$(ENV)/bin/python" ]; then \
		found=; \
		for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
			if "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then found=$$python; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "make: found no Python 3.11 to 3.14 that can make environments; install one (Debian, Ubuntu: with python3-venv), or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; \
		fi; \
		echo "making an environment in $(ENV) with $$($$found --version)"; \
		"$$found" -m venv "$(ENV)"; \
	fi; \
	for stamp in $(2); do \
		file="$(ENV)/.lagm-$$stamp"; \
		if [ "$$(cat "$$file" 2>/dev/null)" = "$(CURDIR)" ] && [ ! settings.ini -nt "$$file" ] && [ ! setup.py -nt "$$file" ]; then exit 0; fi; \
	done; \
	echo "installing into $(ENV) (the first time torch has to be fetched, which is large)"; \
	rm -f "$(ENV)"/.lagm-*; \
	$(RUN) PIP_DISABLE_PIP_VERSION_CHECK=1 python -m pip install -q -e ".$(1)"; \
	echo "$(CURDIR)" > "$(ENV)/.lagm-$(word 1,$(2))"
endef

# Kernels of this environment say after a missing name that the cells above may not have run (lagm.core.cells). A file
# of somebody else's at this place stays as it is.
KERNELS := $(ENV)/etc/ipython/ipython_config.json
kernels:
	@mkdir -p "$(dir $(KERNELS))"
	@[ -e "$(KERNELS)" ] || echo '{"InteractiveShellApp": {"extensions": ["lagm.core.cells"]}}' > "$(KERNELS)"

install:
	$(call ensure,,demo dev)
	@$(MAKE) -s kernels

# JupyterLab of this environment saves notebooks clean from now on: reading one leaves `git status` as it was.
HOOKS := $(ENV)/etc/jupyter/jupyter_server_config.d/lagm.json
install-dev:
	$(call ensure,[dev],dev)
	@$(MAKE) -s kernels
	@mkdir -p "$(dir $(HOOKS))"
	@echo '{"FileContentsManager": {"pre_save_hook": "nbdev.clean.clean_jupyter"}}' > "$(HOOKS)"

install-docs:
	$(call ensure,[docs],docs dev)
