PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint

SECOND := --image_encoder test_efficientnet --image_checkpoint networks/demo_efficientnet.safetensors
BOTH := --image_encoder test_nfnet test_efficientnet \
	--image_checkpoint networks/demo_nfnet.safetensors networks/demo_efficientnet.safetensors \
	--image_trainable False --only_has_image_projection

demo: export OMP_NUM_THREADS := 1
demo: $(VENV)/installed  ## 100 pairs learned from 3,000 drawn pictures, against real pairs and all data, on two encoders
	@echo "1 of 3: experts on all pairs, over a small image encoder. 5 minutes are left."
	$(RUN) buffer.py --dataset demo --disabled_wandb
	@echo "2 of 3: 100 pairs are learned through it. 4 minutes are left."
	@echo "Beside it, on another core: real pairs to compare with, experts over a second encoder (runs/beside.log)."
	mkdir -p runs; ( \
		$(RUN) coreset.py --dataset demo --method random --save_dir runs/coresets && \
		$(RUN) coreset.py --dataset demo --method herding --save_dir runs/coresets && \
		$(RUN) buffer.py --dataset demo --disabled_wandb $(SECOND) \
	) > runs/beside.log 2>&1 & $(RUN) distill.py --dataset demo --disabled_wandb --save_dir runs/demo && wait $$!
	@echo "3 of 3: new networks train on each set, over both encoders; the second took no part. 1 minute is left."
	$(RUN) evaluate.py --synset runs/coresets/random_100.safetensors runs/coresets/herding_100.safetensors \
		runs/demo/best.safetensors $(BOTH) --tune_rates --all_data buffers
	@echo "Look at the pairs, their curves, and search with them: runs/demo/report.html"
	@echo "Next, your own pictures in three commands: README.md"

test: $(VENV)/installed
	$(RUN) -m pytest -n 2

lint: $(VENV)/installed
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@
