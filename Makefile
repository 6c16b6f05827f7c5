# Every target makes the environment first; nothing else is assumed.
BIN := .venv/bin

.PHONY: demo team test check up clean

demo: .venv/.ready  ## run the main job on real data, end to end over HTTP
	$(BIN)/python examples/wordnet/demo.py

team: .venv/.ready  ## the same job through team mode: PostgreSQL, Redis, beat and two workers
	sh scripts/servers.sh
	$(BIN)/python -m scripts.team $(TEAM_ARGS)

test: check  ## lint, types, import rules, then every test
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n 2 -q

check: .venv/.ready  ## lint, types and import rules alone
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

up: .venv/.ready  ## start the service on this machine
	$(BIN)/still up

clean:  ## remove the environment and what the demo made
	rm -rf .venv demo-output

.venv/.ready: pyproject.toml constraints.txt scripts/setup.sh
	sh scripts/setup.sh
