# make test: install what is needed and run every test but the long ones, which make test-long runs.
# make test-long RESUME=1: those of them that did not pass yet for this source.
# make demo: the main job, from a base image to a refusal.
# Both run as root on Debian 12; scripts/setup says what to do otherwise.
PYTHON = .venv/bin/python

.PHONY: packages test test-long demo bench reliability setup lint clean

setup:
	scripts/setup

base: setup
	scripts/make-base-image

lint: setup
	.venv/bin/ruff check .
	.venv/bin/mypy

test: lint base
	scripts/run-tests

packages: setup
	scripts/build-packages $$(. /etc/os-release && echo $$VERSION_CODENAME)

test-long: lint base
	scripts/run-tests --long $(if $(RESUME),--resume)

reliability: base
	scripts/reliability

demo: base
	scripts/testenv $(PYTHON) scripts/demo.py

bench: base
	.venv/bin/pip install -q --disable-pip-version-check -e '.[bench]'
	scripts/bench

clean:
	rm -rf build .venv .mypy_cache .ruff_cache .pytest_cache jindiskd/jindisk/*.so
