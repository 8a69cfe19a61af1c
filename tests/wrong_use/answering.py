"""Wrong uses of the tools that answer: generate, serve, evaluate."""

GENERATE = ["--load_checkpoint", "{ckpt}", "--predict_data", "你好"]
SERVE = ["--load_checkpoint", "{ckpt}", "--port", "0"]
EVALUATE = ["--load_checkpoint", "{ckpt}", "--output_dir", "{out}"]

# What is wrong with a checkpoint directory, and the sentence about it.
CHECKPOINTS = {
    "absent": "error: {absent} cannot be read (No such file or directory); give a checkpoint directory with a config.json",
    "empty": "error: {empty}/config.json cannot be read (No such file or directory); give a checkpoint directory with a "
             "config.json",
    "broken": "error: {broken}/config.json is not valid JSON (Expecting property name enclosed in double quotes)",
    "bare": "error: {bare} holds neither tokenizer.model nor tokenizer.json; copy the published one there",
    "torn": "error: {torn}/model.safetensors is broken or cut short (Error while deserializing header: incomplete metadata, "
            "file not fully covered); copy or convert it again",
    "alien": "error: {alien}/tokenizer.model is not a whole SentencePiece model; give the published tokenizer.model, or a "
             "tokenizer.json",
    "text": "error: {text} is a file; give the checkpoint directory, which holds config.json and the weights",
}

# What is wrong with the directory of an adapter.
ADAPTERS = {
    "absent": ["{absent} holds no adapter_config.json"], "ckpt": ["{ckpt} holds no adapter_config.json"],
    "lora_alpha": ["{lora_alpha}/adapter_config.json", "lora_alpha", "0"], "lora_rank": ["{lora_rank}", "rank 5"],
    "lora_wide": ["{lora_wide} is (64, 2)", "(32, 2)"], "lora_deep": ["{lora_deep} changes transformer.h.2."],
}

USES = [
    # generate
    ("generate", [],
     ["error: the following arguments are required: --load_checkpoint; generate.py --help lists the flags"]),
    ("generate", [*GENERATE, "--temp", "1"],
     ["error: unrecognized arguments: --temp 1; generate.py --help lists the flags"]),
    ("generate", [*GENERATE, "--temperature", "hot"],
     ["error: argument --temperature: invalid float value: 'hot'; generate.py --help lists the flags"]),
    ("generate", [*GENERATE, "--temperature", "-1"], ["error: temperature must be a number at least 0, not -1.0"]),
    ("generate", [*GENERATE, "--temperature", "nan"], ["error: temperature must be a number at least 0, not nan"]),
    ("generate", [*GENERATE, "--top_p", "0"], ["error: top_p must be a number above 0 and at most 1, not 0.0"]),
    ("generate", [*GENERATE, "--top_p", "1.1"], ["error: top_p must be a number above 0 and at most 1, not 1.1"]),
    ("generate", [*GENERATE, "--top_k", "-1"], ["error: top_k must be a whole number of at least 0, not -1"]),
    ("generate", [*GENERATE, "--top_k", "1.5"],
     ["error: argument --top_k: invalid int value: '1.5'; generate.py --help lists the flags"]),
    ("generate", [*GENERATE, "--repetition_penalty", "0"],
     ["error: repetition_penalty must be a number above 0, not 0.0"]),
    ("generate", [*GENERATE, "--max_new_tokens", "0"],
     ["error: max_new_tokens must be a whole number of at least 1, not 0"]),
    ("generate", [*GENERATE, "--max_length", "-5"], ["error: max_length must be a positive whole number, not -5"]),
    ("generate", [*GENERATE, "--max_length", "2"],
     ["error: the prompt has 5 tokens, and max_length 2 leaves no room for an answer; shorten the prompt or raise "
      "max_length"]),
    ("generate", [*GENERATE, "--seed", "-1"], ["error: seed must be a whole number of at least 0, not -1"]),
    ("generate", [*GENERATE, "--speculate", "-1"], ["error: --speculate must be a whole number from 0 to 64, not -1"]),
    ("generate", [*GENERATE, "--dtype", "int8"],
     ["error: argument --dtype: invalid choice: 'int8' (choose from 'float32', 'bfloat16', 'float16'); generate.py "
      "--help lists the flags"]),
    ("generate", [*GENERATE, "--batch_size", "x"],
     ["error: argument --batch_size: invalid int value: 'x'; generate.py --help lists the flags"]),
    ("generate", [*GENERATE, "--independent"], ["error: --independent goes with --input_file"]),
    ("generate", [*GENERATE, "--input_file", "{lines}"], ["error: give --predict_data or --input_file, not both"]),
    ("generate", [*GENERATE[:3], ""], ["error: a prompt must be a string that is not empty"]),
    ("generate", [*GENERATE[:2], "--input_file", "{absent}"],
     ["error: {absent} cannot be read (No such file or directory); give a JSONL file"]),
    ("generate", [*GENERATE[:2], "--input_file", "{text}"],
     ["error: {text}, line 1: is not valid JSON (Expecting value)"]),
    ("generate", [*GENERATE[:2], "--input_file", "{nothing}"],
     ["error: {nothing} holds no line of JSON; give a JSONL file with an object a line"]),
    ("generate", [*GENERATE[:2], "--input_file", "{lines}", "--independent", "--batch_size", "0"],
     ["error: batch_size must be a positive whole number, not 0"]),
    ("generate", [*GENERATE, "--cache_memory", "much"],
     ["error: --cache_memory much is not a size such as 64GB, 60GiB or 500MB"]),
    *[(tool, [flag, "{" + name + "}", *rest], [reason])
      for tool, flag, rest in (("generate", "--load_checkpoint", GENERATE[2:]), ("serve", "--load_checkpoint", SERVE[2:]),
                               ("evaluate", "--load_checkpoint", [*EVALUATE[2:], "--task", "jsonl", "--data", "{lines}"]))
      for name, reason in CHECKPOINTS.items()],
    *[(tool, [flag, "{rundir}", *rest],
       ["error: {rundir} is the directory of a training run; give a checkpoint in it: {rundir}/checkpoint-000100"])
      for tool, flag, rest in (("generate", "--load_checkpoint", GENERATE[2:]), ("serve", "--load_checkpoint", SERVE[2:]),
                               ("evaluate", "--load_checkpoint", [*EVALUATE[2:], "--task", "jsonl", "--data", "{lines}"]))],
    ("generate", [*GENERATE[:2], "--input_file", "{unknown}"],
     ['error: {unknown}, line 2: has the field "context", which is not understood here; remove it, or put what it says into '
      "the question"]),
    # serve
    ("serve", [], ["error: the following arguments are required: --load_checkpoint; serve.py --help lists the flags"]),
    ("serve", [*SERVE, "--max_batch", "0"], ["error: --max_batch must be at least 1, not 0"]),
    ("serve", [*SERVE, "--max_batch", "x"],
     ["error: argument --max_batch: invalid int value: 'x'; serve.py --help lists the flags"]),
    ("serve", [*SERVE, "--max_length", "4"], ["error: --max_length must be at least 8, not 4"]),
    ("serve", [*SERVE, "--prefill_chunk", "0"], ["error: --prefill_chunk must be at least 1, not 0"]),
    ("serve", [*SERVE, "--cache_memory", "4"], ["error: --cache_memory 4 is not a size such as 64GB, 60GiB or 500MB"]),
    ("serve", [*SERVE, "--cache_memory", "0.01MB"],
     ["error: --cache_memory 0.01MB holds ", " tokens, and a sequence of 128 takes ", " GB: give at least that"]),
    ("serve", [*SERVE, "--cache_memory", "0.01MB", "--max_length", "100"],
     ["error: --cache_memory 0.01MB holds ", " tokens, and a sequence of 100 takes ", " GB: give at least that, or lower "
      "--max_length 100"]),
    ("serve", [*SERVE, "--max_queue", "-1"], ["error: --max_queue must be at least 0, not -1"]),
    ("serve", [*SERVE, "--speculate", "100"], ["error: --speculate must be a whole number from 0 to 64, not 100"]),
    ("serve", [*SERVE, "--port", "-1"], ["error: --port must be at least 0, not -1"]),
    ("serve", [*SERVE, "--port", "70000"], ["error: --port must be at most 65535, not 70000"]),
    ("serve", [*SERVE, "--time_limit", "0"], ["error: --time_limit must be above 0 seconds, not 0.0"]),
    ("serve", [*SERVE, "--time_limit", "nan"], ["error: --time_limit must be above 0 seconds, not nan"]),
    ("serve", [*SERVE, "--api_key", ""],
     ["error: --api_key must be one line of printable ASCII characters, without spaces around them and not empty"]),
    ("serve", [*SERVE, "--api_key", "密"],
     ["error: --api_key must be one line of printable ASCII characters, without spaces around them and not empty"]),
    ("serve", [*SERVE, "--api_key", "a", "--api_key_file", "{text}"], ["error: give --api_key or --api_key_file, not both"]),
    ("serve", [*SERVE, "--api_key_file", "{absent}"],
     ["error: --api_key_file {absent} cannot be read (No such file or directory); give a file with the key in its only line"]),
    ("serve", [*SERVE, "--api_key_file", "{nothing}"],
     ["error: --api_key_file {nothing} must be one line of printable ASCII characters, without spaces around them and not "
      "empty"]),
    *[("serve", [*SERVE, "--allow_origin", "http://localhost:3000", origin],
       [f"error: --allow_origin {origin} is not an origin; give scheme, host and port alone, as in http://localhost:3000, or * "
        "for any"]) for origin in ("localhost", "http://localhost:3000/chat")],
    ("serve", [*SERVE, "--allow_origin"], ["error: argument --allow_origin: expected at least one argument"]),
    ("serve", [*SERVE, "--system", "ignore"],
     ["error: argument --system: invalid choice: 'ignore' (choose from 'refuse', 'prepend'); serve.py --help lists "
      "the flags"]),
    ("serve", [*SERVE, "--host", "no.such.host.invalid"],
     ["error: --host no.such.host.invalid --port 0: Name or service not known; give another address or port"]),
    ("serve", [*SERVE, "--host", "192.0.2.1"],
     ["error: --host 192.0.2.1 --port 0: Cannot assign requested address; give another address or port"]),
    ("serve", [*SERVE, "--dtype", "int4"],
     ["error: argument --dtype: invalid choice: 'int4' (choose from 'float32', 'bfloat16', 'float16'); serve.py "
      "--help lists the flags"]),
    ("serve", [*SERVE, "--cache_memory", "65536GB"],
     ["error: the model needs about ", "(key-value cache 65,536.0", " GB are available: lower --cache_memory or "
      "--max_length 160, or give --ignore_memory to try it all the same"]),
    # adapters
    *[(tool, [*flags, "--lora", "{" + name + "}"], words) for tool, flags in (("generate", GENERATE), ("serve", SERVE))
      for name, words in ADAPTERS.items()],
    *[(tool, ["--load_checkpoint", "{adapter}", *flags[2:]], ["error: {adapter} is a LoRA adapter (PEFT)", "--lora"])
      for tool, flags in (("generate", GENERATE), ("serve", SERVE), ("evaluate", [*EVALUATE, "--task", "jsonl", "--data", "{lines}"]))],
    ("serve", [*SERVE, "--lora", "a={lora}", "--lora", "b={lora_wide}"], ["{lora_wide} is (64, 2)", "(32, 2)"]),
    ("serve", [*SERVE, "--lora", "a={lora}", "--lora", "a={lora}"], ["--lora a={lora}", "'a' is the name of another model"]),
    ("serve", [*SERVE, "--model_name", "a", "--lora", "a={lora}"], ["--lora a={lora}", "'a' is the name of another model"]),
    ("serve", [*SERVE, "--lora", "{lora}", "--lora", "a={lora}"], ["--lora {lora}", "one adapter alone"]),
    # evaluate
    ("evaluate", [],
     ["error: the following arguments are required: --load_checkpoint, --task, --data; evaluate.py --help lists the "
      "flags"]),
    ("evaluate", [*EVALUATE, "--task", "gsm8k", "--data", "{empty}"],
     ["error: argument --task: invalid choice: 'gsm8k' (choose from 'ceval', 'mmlu', 'jsonl'); evaluate.py --help "
      "lists the flags"]),
    ("evaluate", [*EVALUATE, "--task", "ceval"],
     ["error: the following arguments are required: --data; evaluate.py --help lists the flags"]),
    ("evaluate", [*EVALUATE, "--task", "ceval", "--data", "{absent}"],
     ["error: {absent}/val cannot be read (No such file or directory); give --data the directory that holds dev/, "
      "val/ and test/"]),
    ("evaluate", [*EVALUATE, "--task", "mmlu", "--data", "{empty}"],
     ["error: {empty}/test cannot be read (No such file or directory); give --data the directory that holds dev/, "
      "val/ and test/"]),
    ("evaluate", [*EVALUATE, "--task", "mmlu", "--data", "{ceval}"],
     ["error: {ceval}/test cannot be read (No such file or directory); give --data the directory that holds dev/, "
      "val/ and test/"]),
    ("evaluate", [*EVALUATE, "--task", "ceval", "--data", "{ceval}"],
     ["error: {ceval}/val/art_val.csv: the first line lacks the columns C, D"]),
    ("evaluate", [*EVALUATE, "--task", "ceval", "--data", "{ceval}", "--split", "train"],
     ["error: argument --split: invalid choice: 'train' (choose from 'val', 'test'); evaluate.py --help lists the "
      "flags"]),
    ("evaluate", [*EVALUATE, "--task", "ceval", "--data", "{ceval}", "--shots", "-1"],
     ["error: --shots must be from 0 to 100, not -1"]),
    ("evaluate", [*EVALUATE, "--task", "jsonl", "--data", "{lines}", "--batch_size", "0"],
     ["error: --batch_size must be at least 1, not 0"]),
    ("evaluate", [*EVALUATE, "--task", "jsonl", "--data", "{lines}", "--cache_memory", "1GB"],
     ["error: --cache_memory goes with --task ceval and mmlu: --task jsonl uses no cache"]),
    ("evaluate", [*EVALUATE, "--task", "jsonl", "--data", "{empty}"],
     ["error: --data {empty} is not a file; --task jsonl wants a JSONL file"]),
    *[("evaluate", [*EVALUATE, "--task", "jsonl", "--data", "{" + name + "}"], [f"error: {{{name}}}{said}"]) for name, said in [
        ("system", ", line 2: has a system text, and TeleChat was not trained with one; put it into the question, or give "
                   "--system prepend, which puts it in front of the first question"),
        ("nothing", " holds no line of JSON; give a JSONL file with an object a line"),
        ("text", ", line 1: is not valid JSON (Expecting value)")]],
]
