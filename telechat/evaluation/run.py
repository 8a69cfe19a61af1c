"""An evaluation from beginning to end, which goes on where an earlier one was broken off."""

import json
import math
import os

from telechat.data.conversation import encode_conversation, read_conversations, read_prompts
from telechat.errors import InputError
from telechat.evaluation.forward import Forward
from telechat.evaluation.multiple_choice import BENCHMARKS, LETTERS, build_prompts, letter_ids
from telechat.parallel.agreement import together
from telechat.parallel.collectives import gather_objects


class Results:
    """Lines of JSON that one evaluation has written, each under a key; kept as they come.

    Args:
        directory (str): where ``answers.jsonl`` and ``evaluation.json`` are.
        identity (dict): what is evaluated and how.
        world (Group): the processes that evaluate together; the first one reads and writes.

    Raises:
        InputError: the directory holds another evaluation, or cannot be written.
    """

    def __init__(self, directory, identity, world):
        self.path = os.path.join(directory, "answers.jsonl")
        self.records, self._file = {}, None
        together(lambda: self._open(directory, identity) if world.rank == 0 else None, world)
        # All must agree on what is left to do.
        self.records = gather_objects(self.records, world)[0]

    def _open(self, directory, identity):
        about = os.path.join(directory, "evaluation.json")
        if os.path.exists(about):
            with open(about, encoding="utf-8") as file:
                earlier = json.load(file)
            different = [name for name in identity if earlier.get(name) != identity[name]]
            if different:
                raise InputError(f"{directory} holds an evaluation with another {different[0]} "
                                 f"({earlier.get(different[0])}); give another --output_dir, or remove it")
            self._read()
        else:
            os.makedirs(directory, exist_ok=True)
            with open(about, "w", encoding="utf-8") as file:
                json.dump(identity, file, ensure_ascii=False, indent=2)
        self._file = open(self.path, "a", encoding="utf-8")

    def _read(self):
        if not os.path.exists(self.path):
            return
        complete = 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # cut short by a crash
                record = json.loads(line)
                self.records[record["key"]] = record
                complete += len(line)
        os.truncate(self.path, complete)

    def add(self, key, **record):
        """Keep what was found out about ``key``."""
        self.records[key] = {"key": key, **record}
        if self._file:
            self._file.write(json.dumps(self.records[key], ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self):
        """Close the file."""
        if self._file:
            self._file.close()


def evaluate_choices(task, directory, split, model, settings, results, shots=5, batch_size=4, say=print):
    """Accuracy in multiple choice.

    Args:
        task (str): "ceval" or "mmlu".
        directory (str): the benchmark's, with ``dev/`` and ``split``.
        split (str): "val" or "test".
        model: a `TeleChat` or this process's part of one.
        settings (GenerationSettings): tokenizer and chat format.
        results (Results): gets every answer.
        shots (int): worked examples in front of a question.
        batch_size (int): questions at a time.
        say (callable): takes a line of progress.

    Returns:
        dict: "subjects": name → {"questions", "correct", "accuracy"} (accuracy None where the file tells no
        answers), "accuracy": the mean over subjects, "accuracy_of_questions": over all questions.
    """
    benchmark = BENCHMARKS[task]
    forward = Forward(model)
    letters, before = letter_ids(settings.tokenizer)
    max_length = model.config.training_seqlen - len(before)
    subjects = benchmark.subjects(directory, split)
    questions = {subject: benchmark.read(directory, split, subject) for subject in subjects}
    examples = {subject: benchmark.read(directory, "dev", subject)[:shots] if shots else [] for subject in subjects}
    scores = {}
    for subject in subjects:
        waiting = [question for question in questions[subject] if f"{subject}/{question.number}" not in results.records]
        # Of like length together, so that little is filled up.
        prompts = build_prompts(benchmark, settings, subject, examples[subject], waiting, max_length)
        order = sorted(range(len(waiting)), key=lambda place: len(prompts[place]))
        for first in range(0, len(order), batch_size):
            chosen = order[first:first + batch_size]
            logits = forward.last_logits([prompts[place] + before for place in chosen])[:, letters]
            for place, row in zip(chosen, logits):
                results.add(f"{subject}/{waiting[place].number}", answer=LETTERS[int(row.argmax())],
                            correct=waiting[place].answer, logits=[round(float(value), 4) for value in row])
        scores[subject] = _score(subject, questions[subject], results)
        say(describe(subject, scores[subject]))
    known = [score for score in scores.values() if score["accuracy"] is not None]
    correct, asked = (sum(score[name] for score in known) for name in ("correct", "questions"))
    return {"subjects": scores,
            "accuracy": sum(score["accuracy"] for score in known) / len(known) if known else None,
            "accuracy_of_questions": correct / asked if asked else None}


def _score(subject, questions, results):
    answers = [results.records[f"{subject}/{question.number}"]["answer"] for question in questions]
    if not questions or not all(question.answer for question in questions):
        return {"questions": len(questions), "correct": None, "accuracy": None}
    correct = sum(answer == question.answer for answer, question in zip(answers, questions))
    return {"questions": len(questions), "correct": correct, "accuracy": correct / len(questions)}


def describe(subject, score):
    """A line of the table."""
    accuracy = "    –" if score["accuracy"] is None else f"{score['accuracy']:6.1%}"
    return f"{subject[:48]:48s} {score['questions']:6d} {accuracy:>7s}"


def evaluate_perplexity(path, model, settings, results, batch_size=4, say=print):
    """Loss a token and perplexity of a JSONL file.

    Lines are conversations as for fine-tuning, whose answers and end tokens count, or {"text": "…"}, where all
    tokens but the first count. What is longer than training_seqlen + 1 tokens is cut off behind.

    Returns:
        dict: "sequences", "cut", "tokens", "loss" (mean cross entropy a token), "perplexity".
    """
    sequences = _sequences(path, settings)
    longest = model.config.training_seqlen + 1
    cut = sum(len(ids) > longest for ids, _ in sequences)
    sequences = [(ids[:longest], labels[:longest]) for ids, labels in sequences]
    forward = Forward(model)
    waiting = sorted((number for number in range(len(sequences)) if str(number) not in results.records),
                     key=lambda number: len(sequences[number][0]))
    for first in range(0, len(waiting), batch_size):
        chosen = waiting[first:first + batch_size]
        losses, counts = forward.losses(*zip(*(sequences[number] for number in chosen)))
        for number, loss, count in zip(chosen, losses, counts):
            results.add(str(number), loss=float(loss), tokens=int(count))
        say(f"{min(first + batch_size, len(waiting))} of {len(waiting)} sequences")
    loss, tokens = (sum(results.records[str(number)][name] for number in range(len(sequences)))
                    for name in ("loss", "tokens"))
    if not tokens:
        raise InputError(f"{path} holds no token that counts")
    mean = loss / tokens
    # exp of 700 is about the largest number there is.
    perplexity = math.exp(mean) if mean < 700 else float("inf")
    return {"sequences": len(sequences), "cut": cut, "tokens": tokens, "loss": mean, "perplexity": perplexity}


def _sequences(path, settings):
    """(ids, labels) of every line."""
    tokenizer, chat_format = settings.tokenizer, settings.chat_format
    try:
        texts = read_prompts(path, "text")
    except InputError as error:
        if 'line 1: lacks the field "text"' not in str(error):
            raise
        spellings = tuple(tokenizer.id_to_token(index) for index in (chat_format.user, chat_format.bot))
        return [encode_conversation(tokenizer, chat_format, turns) for turns in
                read_conversations(path, spellings, template=chat_format.template)]
    sequences = []
    for number, text in enumerate(texts, start=1):
        ids = tokenizer.encode(text, control_tokens=False)
        if len(ids) < 2:
            raise InputError(f"{path}, text {number}: must have at least two tokens")
        sequences.append((ids, ids))
    return sequences
