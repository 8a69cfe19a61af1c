"""Wrong uses of the tools that answer: generate, serve, evaluate."""

GENERATE = ["--load_checkpoint", "{ckpt}", "--predict_data", "你好"]
SERVE = ["--load_checkpoint", "{ckpt}", "--port", "0"]
EVALUATE = ["--load_checkpoint", "{ckpt}", "--output_dir", "{out}"]

USES = [
    # generate
    ("generate", [], ["--load_checkpoint"]),
    ("generate", [*GENERATE, "--temp", "1"], ["--temp"]),
    ("generate", [*GENERATE, "--temperature", "hot"], ["--temperature", "hot"]),
    ("generate", [*GENERATE, "--temperature", "-1"], ["temperature"]),
    ("generate", [*GENERATE, "--temperature", "nan"], ["temperature"]),
    ("generate", [*GENERATE, "--top_p", "0"], ["top_p"]),
    ("generate", [*GENERATE, "--top_p", "1.1"], ["top_p"]),
    ("generate", [*GENERATE, "--top_k", "-1"], ["top_k"]),
    ("generate", [*GENERATE, "--top_k", "1.5"], ["--top_k"]),
    ("generate", [*GENERATE, "--repetition_penalty", "0"], ["repetition_penalty"]),
    ("generate", [*GENERATE, "--max_new_tokens", "0"], ["max_new_tokens"]),
    ("generate", [*GENERATE, "--max_length", "-5"], ["max_length"]),
    ("generate", [*GENERATE, "--max_length", "2"], ["max_length 2"]),
    ("generate", [*GENERATE, "--seed", "-1"], ["seed"]),
    ("generate", [*GENERATE, "--dtype", "int8"], ["--dtype", "int8"]),
    ("generate", [*GENERATE, "--batch_size", "x"], ["--batch_size"]),
    ("generate", [*GENERATE, "--independent"], ["--independent"]),
    ("generate", [*GENERATE, "--input_file", "{lines}"], ["--predict_data", "--input_file"]),
    ("generate", [*GENERATE[:3], ""], ["empty"]),
    ("generate", [*GENERATE[:2], "--input_file", "{absent}"], ["{absent}"]),
    ("generate", [*GENERATE[:2], "--input_file", "{text}"], ["{text}", "line 1"]),
    ("generate", [*GENERATE[:2], "--input_file", "{nothing}"], ["{nothing}"]),
    ("generate", [*GENERATE[:2], "--input_file", "{lines}", "--independent", "--batch_size", "0"], ["batch_size"]),
    *[(tool, [flag, "{" + name + "}", *rest], ["{" + name + "}"])
      for tool, flag, rest in (("generate", "--load_checkpoint", GENERATE[2:]), ("serve", "--load_checkpoint", SERVE[2:]),
                               ("evaluate", "--load_checkpoint", [*EVALUATE[2:], "--task", "jsonl", "--data", "{lines}"]))
      for name in ("absent", "empty", "broken", "bare", "torn", "alien", "text")],
    *[(tool, [flag, "{rundir}", *rest],
       ["error: {rundir} is the directory of a training run; give a checkpoint in it: {rundir}/checkpoint-000100"])
      for tool, flag, rest in (("generate", "--load_checkpoint", GENERATE[2:]), ("serve", "--load_checkpoint", SERVE[2:]),
                               ("evaluate", "--load_checkpoint", [*EVALUATE[2:], "--task", "jsonl", "--data", "{lines}"]))],
    ("generate", [*GENERATE[:2], "--input_file", "{unknown}"],
     ['error: {unknown}, line 2: has the field "context", which is not understood here; remove it, or put what it says into '
      "the question"]),
    # serve
    ("serve", [], ["--load_checkpoint"]),
    ("serve", [*SERVE, "--max_batch", "0"], ["--max_batch", "0"]),
    ("serve", [*SERVE, "--max_batch", "x"], ["--max_batch", "x"]),
    ("serve", [*SERVE, "--max_length", "4"], ["--max_length", "4"]),
    ("serve", [*SERVE, "--max_queue", "-1"], ["--max_queue"]),
    ("serve", [*SERVE, "--port", "-1"], ["--port"]),
    ("serve", [*SERVE, "--port", "70000"], ["--port", "70000"]),
    ("serve", [*SERVE, "--time_limit", "0"], ["--time_limit"]),
    ("serve", [*SERVE, "--time_limit", "nan"], ["--time_limit"]),
    ("serve", [*SERVE, "--api_key", ""], ["--api_key"]),
    ("serve", [*SERVE, "--api_key", "密"], ["--api_key"]),
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
    ("serve", [*SERVE, "--system", "ignore"], ["--system", "ignore"]),
    ("serve", [*SERVE, "--host", "no.such.host.invalid"], ["--host no.such.host.invalid"]),
    ("serve", [*SERVE, "--host", "192.0.2.1"], ["--host 192.0.2.1"]),
    ("serve", [*SERVE, "--dtype", "int4"], ["--dtype"]),
    ("serve", [*SERVE, "--max_batch", "1000000000"], ["--max_batch 1000000000", "key-value cache"]),
    # evaluate
    ("evaluate", [], ["--load_checkpoint"]),
    ("evaluate", [*EVALUATE, "--task", "gsm8k", "--data", "{empty}"], ["--task", "gsm8k"]),
    ("evaluate", [*EVALUATE, "--task", "ceval"], ["--data"]),
    ("evaluate", [*EVALUATE, "--task", "ceval", "--data", "{absent}"], ["{absent}"]),
    ("evaluate", [*EVALUATE, "--task", "mmlu", "--data", "{empty}"], ["{empty}"]),
    ("evaluate", [*EVALUATE, "--task", "mmlu", "--data", "{ceval}"], ["{ceval}"]),
    ("evaluate", [*EVALUATE, "--task", "ceval", "--data", "{ceval}"], ["art_val.csv", "C, D"]),
    ("evaluate", [*EVALUATE, "--task", "ceval", "--data", "{ceval}", "--split", "train"], ["--split"]),
    ("evaluate", [*EVALUATE, "--task", "ceval", "--data", "{ceval}", "--shots", "-1"], ["--shots"]),
    ("evaluate", [*EVALUATE, "--task", "jsonl", "--data", "{lines}", "--batch_size", "0"], ["--batch_size"]),
    ("evaluate", [*EVALUATE, "--task", "jsonl", "--data", "{empty}"], ["{empty}"]),
    *[("evaluate", [*EVALUATE, "--task", "jsonl", "--data", "{" + name + "}"], [f"error: {{{name}}}{said}"]) for name, said in [
        ("system", ", line 2: has a system text, and TeleChat was not trained with one; put it into the question, or give "
                   "--system prepend, which puts it in front of the first question"),
        ("nothing", " holds no line of JSON; give a JSONL file with an object a line"),
        ("text", ", line 1: is not valid JSON (Expecting value)")]],
]
