PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint

ENCODERS := --image_encoder test_nfnet test_efficientnet \
	--image_checkpoint networks/demo_nfnet.safetensors networks/demo_efficientnet.safetensors

# Networks this small are twice as fast on one thread as on two.
demo: export OMP_NUM_THREADS := 1
demo: $(VENV)/installed  ## 100 pairs learned from 3,000 drawn pictures, against real pairs and all data, on two encoders
	@echo "1 of 4: experts on all pairs, over two small image encoders. 5 minutes are left."
	$(RUN) buffer.py --dataset demo --disabled_wandb $(ENCODERS)
	@echo "2 of 4: real pairs to compare with, by chance and by herding. 4 minutes are left."
	$(RUN) coreset.py --dataset demo --method random --save_dir runs/coresets
	$(RUN) coreset.py --dataset demo --method herding --save_dir runs/coresets
	@echo "3 of 4: 100 pairs are learned through test_nfnet. 3 minutes are left."
	$(RUN) distill.py --dataset demo --disabled_wandb --save_dir runs/demo
	@echo "4 of 4: new networks train on each set, on test_nfnet and on an encoder that took no part. 1 minute is left."
	$(RUN) evaluate.py --synset runs/coresets/random_100.safetensors runs/coresets/herding_100.safetensors \
		runs/demo/best.safetensors $(ENCODERS) --tune_rates --all_data buffers
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
