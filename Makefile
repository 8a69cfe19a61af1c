# make demo: set up, preprocess, fine-tune, chat.   make test: set up, run the tests.
# Everything is installed into .venv, nothing outside the project is touched.

PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo demo-lora simulator test test-ascend test-16 test-web test-export test-docs test-versions test-mutation docs soak soak-serve bench-serving bench-llama-cpp clean

.venv/installed: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[serve]'
	touch $@

# torch on a line of its own: pip then takes the CPU build where there is one.
.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/installed
	rm -rf demo
	$(BIN)/python tools/preprocess.py --input_dataset_file samples/conversations.jsonl:8 \
	    --output_path demo/data --vocab_file_path samples/tokenizer.model --max_length 160
	$(BIN)/python tools/train.py --config configs/demo.yaml --train_dataset demo/data \
	    --output_dir demo/run tokenizer=samples/tokenizer.model
	$(BIN)/python tools/generate.py --load_checkpoint demo/run/final \
	    --input_file samples/questions.jsonl --independent --batch_size 1
	cp demo/run/loss.png demo/loss.png
	@echo "data demo/data, checkpoint demo/run/final, metrics demo/run/metrics.jsonl, curves demo/loss.png"
	@echo "chat with it: $(BIN)/python tools/generate.py --load_checkpoint demo/run/final"
	@echo "or in a browser, at http://127.0.0.1:8000/: $(BIN)/python tools/serve.py --load_checkpoint demo/run/final --model_name demo --max_length 512"

# An adapter that teaches the demo's model twelve new conversations, the old ones mixed in twice; asked are both kinds.
demo-lora: .venv/installed
	test -e demo/run/final || $(MAKE) --no-print-directory demo
	rm -rf demo/lora-data demo/lora
	$(BIN)/python tools/preprocess.py --input_dataset_file samples/new_conversations.jsonl:16 samples/conversations.jsonl:2 \
	    --output_path demo/lora-data --vocab_file_path samples/tokenizer.model --max_length 160
	$(BIN)/python tools/train.py --config configs/lora_demo.yaml --train_dataset demo/lora-data \
	    --load_checkpoint demo/run/final --output_dir demo/lora
	$(BIN)/python tools/generate.py --load_checkpoint demo/run/final --lora demo/lora/final \
	    --input_file samples/new_questions.jsonl --independent --batch_size 1

# The simulated Ascend card, on which MindSpore's own Ascend back end runs in the tests.
simulator: .venv/installed
	$(MAKE) --no-print-directory -j 2 -C simulator PYTHON=$(CURDIR)/$(BIN)/python

# Two files of tests at a time: compiling keeps one core busy. Then a choice of them without operators for CPUs.
test: .venv/installed-dev simulator
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests
	$(BIN)/python -m pytest -q --portable tests/test_model.py tests/generation/test_engine.py tests/training/test_trainer.py \
	    -k "not wrong and (logits or greedy or official_trace or padded or slots)"

# All that runs on the simulated card; `make test` has a choice of it.
test-ascend: .venv/installed-dev simulator
	$(BIN)/python -m pytest -q -m "not wide and not soak and not soak_serve" tests/ascend tests/simulator tests/distributed/test_*_card.py

# The meshes that take too long for every change.
test-16: .venv/installed-dev
	$(BIN)/python -m pytest -q -m wide tests

# The chat page in Debian's chromium, which is installed where it is missing.
test-web: .venv/installed-dev
	command -v chromium || command -v chromium-browser || { export DEBIAN_FRONTEND=noninteractive; \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } \
	    || { echo "chromium cannot be installed (as root: apt-get install chromium)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet 'playwright>=1.40,<2'
	$(BIN)/python -m pytest -q -m web tests

# The exports in the libraries that they are for: transformers and llama.cpp, which is built from source (some minutes);
# and what quantising costs the demo model.
test-export: .venv/installed-dev
	test -e demo/run/final/config.json || $(MAKE) --no-print-directory demo
	CMAKE_ARGS="-DLLAVA_BUILD=OFF" $(BIN)/python -m pip install --quiet --no-binary llama-cpp-python 'llama-cpp-python>=0.3.9,<0.4'
	$(BIN)/python -m pytest -q tests/export

# Every command of the README and docs/, on tiny checkpoints in the published layouts; launch.py and msrun scaled down.
test-docs: .venv/installed-dev
	$(BIN)/python -m pytest -q -m docs tests

# The documentation with the API reference, as web pages in build/docs.
docs: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The official numbers and doctor on every MindSpore that setup.py allows, each in an environment of its own below build/.
VERSIONS := 2.8.0 2.9.0 2.10.0
test-versions:
	for version in $(VERSIONS); do \
	    echo "MindSpore $$version"; environment=build/mindspore-$$version; \
	    test -e $$environment/installed || { $(PYTHON) -m venv $$environment \
	        && $$environment/bin/python -m pip install --quiet torch==2.13.0 \
	        && $$environment/bin/python -m pip install --quiet mindspore==$$version --editable '.[dev]' \
	        && touch $$environment/installed; } || exit 1; \
	    $$environment/bin/python tools/doctor.py || exit 1; \
	    $$environment/bin/python -m pytest -q tests/test_model.py tests/generation/test_generator.py \
	        tests/training/test_trainer.py tests/nn/test_kernels.py || exit 1; \
	done

# Whether the tests notice small faults in the code: 300 of them, an hour and more; it goes on where it was broken off.
test-mutation: .venv/installed-dev
	$(BIN)/python -m tests.mutation --count 300 --seed 17

# Ten SIGKILLs at random moments of a run of four processes.
soak: .venv/installed-dev
	$(BIN)/python -m pytest -q -s -m soak tests

# A server with two adapters under sixteen clients for half an hour; MINUTES=1 is a trial.
MINUTES := 30
soak-serve: .venv/installed-dev
	$(BIN)/python -m pytest -q -s -m soak_serve --soak_minutes $(MINUTES) tests/serving

# The server beside others of the same weights: transformers serve, and llama.cpp's server, which is built from the sources
# that llama-cpp-python brings (some minutes).
bench-serving: .venv/installed-dev
	$(BIN)/python -m pip install --quiet 'transformers[serving]>=5.20,<6'
	$(BIN)/python -m benchmarks.serving

LLAMA_CPP := build/llama.cpp
bench-llama-cpp: .venv/installed-dev $(LLAMA_CPP)/build/bin/llama-server
	$(BIN)/python -m benchmarks.serving --peer llama.cpp

$(LLAMA_CPP)/build/bin/llama-server: | .venv/installed-dev
	mkdir -p $(LLAMA_CPP)
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(LLAMA_CPP) llama-cpp-python==0.3.36
	tar -xzf $(LLAMA_CPP)/llama_cpp_python-0.3.36.tar.gz -C $(LLAMA_CPP) --strip-components=1
	cmake -S $(LLAMA_CPP)/vendor/llama.cpp -B $(LLAMA_CPP)/build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
	    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
	cmake --build $(LLAMA_CPP)/build --target llama-server -j 2

clean:
	rm -rf .venv demo build *.egg-info
