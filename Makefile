PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint

demo: $(VENV)/installed  ## experts, distillation and the comparison with real pairs and all data, on the drawn data set
	$(RUN) buffer.py --dataset demo --disabled_wandb
	$(RUN) distill.py --dataset demo --disabled_wandb --save_dir runs/demo
	$(RUN) evaluate.py --synset runs/demo/iteration_000000.safetensors runs/demo/best.safetensors --tune_rates \
		--all_data buffers

test: $(VENV)/installed
	$(RUN) -m pytest -n 2

lint: $(VENV)/installed
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@
