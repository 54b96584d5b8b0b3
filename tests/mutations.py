"""Would the tests notice? Small faults are planted in copies of the code, and the tests have to catch each.

    python tests/mutations.py                  prints a Markdown table of all faults, in minutes on one core
    python tests/mutations.py mask decay       of the faults whose words contain "mask" or "decay"
    python tests/mutations.py --all            names every test that fails, not only the first; takes longer

A fault is a piece of text that occurs exactly once in a file, what is written in its place, and the tests
that have to notice: whole files, or single tests where a file takes long. These must pass on the code as it
is, so that is tried first. The command ends with
1 if a fault goes unnoticed, and with 2 if a fault no longer fits the code or the tests do not run.

To add a fault, add a row to FAULTS. pytest does not collect this file.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 10  # after which tests count as hanging

# pytest, but hypothesis does not look for a simpler case of a failure: that would be most of the time
PYTEST = """
import sys, hypothesis, pytest
generate = hypothesis.Phase.explicit, hypothesis.Phase.generate
hypothesis.settings.register_profile("as it comes", phases=generate, database=None)
hypothesis.settings.load_profile("as it comes")
sys.exit(pytest.main(sys.argv[1:]))
"""


class Fault(NamedTuple):
    what: str
    file: str
    old: str  # occurs exactly once in the file
    new: str
    tests: tuple[str, ...]  # that should notice, as "test_x.py" or "test_x.py::test_y", in this order


LAWS = ("test_operator_laws.py",)
MODEL = ("test_model.py",)
FUTURE_SEED = ("test_fs.py",)

FAULTS = [
    # ---- the operator ----
    Fault("recurrence: the decay comes after the writing", "wkv.py",
          "S = (S * log_w_t.exp()).addcmul(u_t.mT, b_t).addcmul(v_t.mT, k_t)",
          "S = S.addcmul(u_t.mT, b_t).addcmul(v_t.mT, k_t) * log_w_t.exp()", LAWS),
    Fault("chunked: a mask that is off by one, so that a token reads what it writes", "wkv.py",
          "columns[:, :L].tril_(-1)", "columns[:, :L].tril_()", LAWS),
    Fault("chunked: the gradient of b halved", "wkv.py",
          "db, dk = dkeys.unflatten(1, (2, L)).div_(P[:, None]).unbind(1)",
          "db, dk = dkeys.unflatten(1, (2, L)).div_(P[:, None]).unbind(1)\n    db = db / 2", LAWS),
    Fault("chunked: the gradient of the state is not handed back from span to span", "wkv.py",
          "*parts, dS = _backward(chunks, spans[i], dy, dS)",
          "*parts, _ = _backward(chunks, spans[i], dy, dS)",
          ("test_wkv.py",)),
    Fault("token kernel: a and b swapped", "wkv_kernel.cu",
          "a[i] = load_one(a_ + at);\n        b[i] = load_one(b_ + at);",
          "a[i] = load_one(b_ + at);\n        b[i] = load_one(a_ + at);", LAWS),
    Fault("chunked kernel: a padding that is not masked", "wkv_kernel.cu",
          "const bool wanted = chunk * L + t < T;", "const bool wanted = chunk * L + t <= T;",
          (*LAWS, "test_wkv_kernel.py")),

    # ---- the model ----
    Fault("the first answer token's neighbour is padding", "model.py",
          "extended[:, columns.T] = last", "pass", MODEL),
    Fault("the decay of padding is not masked", "model.py",
          "log_w = log_w.masked_fill(columns.padding, 0)", "pass", MODEL),
    Fault("one padded row is read through its padding", "model.py",
          'if lengths is not None and lengths.device.type == "cpu" and (lengths == T).all():',
          "if lengths is not None and len(lengths) == 1:", FUTURE_SEED),
    Fault("the value residual the other way round", "model.py",
          "v = v + (v_first - v) * torch.sigmoid", "v = v_first + (v - v_first) * torch.sigmoid", MODEL),
    Fault("a checkpoint that is renamed before it is on the disk", "model.py",
          "os.fsync(handle)", "pass", ("test_checkpoint.py",)),

    # ---- Future-Seed ----
    Fault("detach is dropped", "fs.py", "base = base.detach()", "pass", FUTURE_SEED),
    Fault("the clip comes before the gate", "fs.py",
          """        seed_state = self.gate_of(layer, x_last) * base
        if self.clip > 0:
            seed_state = seed_state.clamp(-self.clip, self.clip)
""", """        if self.clip > 0:
            base = base.clamp(-self.clip, self.clip)
        seed_state = self.gate_of(layer, x_last) * base
""", FUTURE_SEED),
    Fault("the seed state comes from the wrong layer", "model.py",
          "seed_state(layer, new_state[-1].wkv, x_last)", "seed_state(layer, new_state[0].wkv, x_last)",
          FUTURE_SEED),
    Fault("the input gate looks at the last column, which may be padding", "model.py",
          "x_last = x[columns.rows, columns.lengths - 1]", "x_last = x[:, columns.T - 1]", FUTURE_SEED),

    # ---- questions, prompts and batches ----
    Fault("ARC's answer has a space after a prompt that ends in one", "data.py",
          'space = ""', 'space = " "', ("test_data.py::test_arcs_border",)),
    Fault("an answer that was cut is taught to end", "data.py",
          """    if end_mark and len(answer_tokens) <= max_answer:
        answer_tokens = answer_tokens + tokenizer""", """    if end_mark:
        answer_tokens = answer_tokens[:max_answer] + tokenizer""", ("test_data.py::test_end_mark",)),
    Fault("every epoch is the first one again", "data.py",
          "epoch, skip = epoch + 1, 0", "skip = 0", ("test_data.py::test_batches",
          "test_data.py::test_batches_pad_little_and_change_with_seed_and_epoch")),
    Fault("validation questions that are training questions in another order", "standin.py",
          "sorted(facts) + [names[asked]]", "facts + [names[asked]]",
          ("test_standin.py::test_validation_is_new_and_guesses_do_not_pay",)),
    Fault("a base whose label is not compared", "standin.py",
          'if fits and made_by["sha256"] == model.sha256:', 'if made_by["sha256"] == model.sha256:',
          ("test_standin.py::test_a_base_says_what_made_it",)),
    Fault("a round that inherits the log's numbers", "rounds.py",
          '{"name": name, **NOT_INHERITED}', '{"name": name}', ("test_rounds.py::test_inheritance",)),

    # ---- a run ----
    Fault("pieces of a batch count alike, whatever their number of rows", "train.py",
          "(loss.sum() / len(batch)).backward()", "(loss.mean() * rows / len(batch)).backward()",
          ("test_train.py::test_a_step_follows_the_recipe",)),
    Fault("a resume forgets the optimizer's moments", "train.py",
          """        if saved["step"] > 0:
            self.check_moments(saved["step"])
""", """        for moments in self.optimizer.state.values():
            moments["exp_avg"].zero_()
            moments["exp_avg_sq"].zero_()
""", ("test_train.py::test_however_often_it_is_stopped_it_ends_with_the_same_bits",)),
    Fault("the lock is not looked at before a save", "train.py",
          "        self.check_owner()\n        fs_weights = None\n", "        fs_weights = None\n",
          ("test_train.py::test_a_run_whose_folder_was_deleted_leaves_the_next_one_alone",)),
    Fault("a lock of another process in the same place is taken for one's own", "files.py",
          "if not lock.exists() or not os.path.samestat(os.stat(lock), locked):", "if not lock.exists():",
          ("test_files.py::test_an_owner_notices_that_its_folder_is_gone",)),
    Fault("a file that is renamed before it is on the disk", "files.py",
          "            os.fsync(handle)\n", "",
          ("test_files.py::test_a_file_is_on_the_disk_before_it_has_its_name",)),
    Fault("a checkpoint of other settings is gone on from", "runs.py",
          '    check_same_run(path, saved["identity"], identity)\n', "",
          ("test_train.py::test_another_run_is_refused",)),
    Fault("seeds of other settings are compared", "runs.py",
          '("source", "settings", "minutes", "base", "data") if key in run}',
          '("source", "minutes", "base", "data") if key in run}',
          ("test_runs.py::test_unlike_runs_are_refused",)),
    Fault("the scores of a step that is not the last", "runs.py",
          'evaluations[arm] = by_step[run["steps"]]', "evaluations[arm] = by_step[min(by_step)]",
          ("test_runs.py::test_a_round_comes_back_as_written",)),
    Fault("an arm that ran on another machine is copied", "runs.py",
          "if whole and ran_like_this and not", "if whole and not",
          ("test_runs.py::test_an_identical_arm_of_another_round_is_copied_whole_or_not_at_all",)),

    # ---- scores and reports ----
    Fault("a padded answer is scored", "eval.py",
          "sum(hits[row][:count])", "sum(hits[row])", ("test_eval.py::test_padding_is_no_right_answer",)),
    Fault("the gold answer is cut at max_answer", "eval.py",
          "exact = float(normalise(text) == normalise(example.text))",
          "exact = float(normalise(text) == normalise(tokenizer.decode(example.answer)))",
          ("test_eval.py::test_an_answer_is_the_line_that_the_model_writes",)),
    Fault("white space before an answer ends it", "eval.py",
          "if token in tokenizer.tokens]).lstrip()", "if token in tokenizer.tokens])",
          ("test_eval.py::test_an_answer_is_the_line_that_the_model_writes",)),
    Fault("the control of another prompt borrows from its own", "eval.py",
          "return prompts[1:] + prompts[:1]", "return prompts",
          ("test_eval.py::test_records_say_what_the_model_did",)),
    Fault("a difference with the wrong sign", "report.py",
          "d = with_fs - without\n", "d = without - with_fs\n",
          ("test_report.py::test_the_numbers_are_those_of_the_records",)),
    Fault("differences by question where they should be by seed", "report.py",
          "means = d.mean(axis=1)", "means = d.mean(axis=0)",
          ("test_report.py::test_the_numbers_are_those_of_the_records",)),
    Fault("a median that is a mean", "report.py",
          "np.median(d_acc)", "np.mean(d_acc)",
          ("test_report.py::test_the_numbers_are_those_of_the_records",)),
    Fault("any seeds of a registered round count as registered", "report.py",
          ' and sorted(found) == sorted(published.registered))', ")",
          ("test_report.py::test_registered_is_what_was_registered",)),

    # ---- statistics ----
    Fault("the rank of the median's interval off by one", "stats.py",
          "high = float(deltas[S - rank] + shift)", "high = float(deltas[S - rank - 1] + shift)",
          ("test_stats.py",)),
    Fault("the variance of questions over the wrong axis", "stats.py",
          "rest = x - question - x.mean(axis=1, keepdims=True) + x.mean()",
          "rest = x - question - x.mean(axis=0, keepdims=True) + x.mean()", ("test_stats.py",)),

    # ---- the tokenizer ----
    Fault("the longest token cut by one byte", "tokenizer.py",
          "LONGEST = 128 ", "LONGEST = 127 ", ("test_tokenizer.py",)),
]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="plant only faults whose words contain one of these")
    parser.add_argument("--all", action="store_true", help="name every test that fails, not the first alone")
    options = parser.parse_args(argv)
    faults = FAULTS
    if options.words:
        faults = [fault for fault in FAULTS if any(word in fault.what for word in options.words)]
    if not faults:
        print(f"error: no fault contains any of {options.words}; mutations.py lists them", file=sys.stderr)
        return 2
    try:
        return table(faults, stop_at_first=not options.all)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def table(faults, stop_at_first):
    """Prints the table, a row as soon as it is known. 0 if every fault was caught, else 1."""
    needed = list(dict.fromkeys(name for fault in faults for name in fault.tests))
    with tempfile.TemporaryDirectory() as folder:
        failed = failing_tests(copy_of_the_code(folder), needed, stop_at_first=True)
    if failed:
        raise ValueError(f"{failed[0]} fails in the code as it is; mend that first")
    print("| fault | file | caught by |\n|---|---|---|", flush=True)
    begin, missed = time.monotonic(), 0
    for fault in faults:
        with tempfile.TemporaryDirectory() as folder:
            code = copy_of_the_code(folder)
            plant(fault, code)
            failed = failing_tests(code, fault.tests, stop_at_first)
        caught_by = ", ".join(f"`{name}`" for name in failed)
        if not failed:
            caught_by = "**nothing**"
            missed += 1
        print(f"| {fault.what} | {fault.file} | {caught_by} |", flush=True)
    seconds = time.monotonic() - begin
    print(f"{len(faults) - missed} of {len(faults)} caught, in {seconds:.0f} s", file=sys.stderr)
    return 1 if missed else 0


def copy_of_the_code(folder):
    """A copy of the files that git knows or would add, as they are now, with ../shared where there is one."""
    code = Path(folder, "code")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        source, target = ROOT / name, code / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    shared = ROOT.parent / "shared"
    if shared.is_dir():
        Path(folder, "shared").symlink_to(shared)
    return code


def plant(fault, code):
    """Writes the fault into a copy. ValueError if its old text does not occur exactly once."""
    path = code / fault.file
    text = path.read_text(encoding="utf-8")
    found = text.count(fault.old)
    if found != 1:
        raise ValueError(f'"{fault.what}" no longer fits: its old text occurs {found} times in {fault.file}; '
                         "write its row in FAULTS anew")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


def failing_tests(code, test_files, stop_at_first):
    """The names of tests that fail, as in "test_stats.py::test_interval_by_hand"; ["it hangs"] where they do
    not come to an end. ValueError if the tests do not start.
    """
    options = ["-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", "-o", "addopts="]
    if stop_at_first:
        options.append("-x")
    command = [sys.executable, "-c", PYTEST, *options, *(f"tests/{name}" for name in test_files)]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ran = subprocess.run(command, cwd=code, capture_output=True, text=True, timeout=60 * MINUTES,
                             env=surroundings)
    except subprocess.TimeoutExpired:
        return ["it hangs"]
    if ran.returncode not in (0, 1):
        said = (ran.stdout + ran.stderr)[-2000:]
        raise ValueError(f"pytest does not run {', '.join(test_files)}: {said}")
    # what a test is called with is named where it is plain words, as in "[chunked kernel, bf16]"
    failed = re.findall(r"^(?:FAILED|ERROR) tests/(\S+?::\w+(?:\[[\w ,]+\])?)", ran.stdout, re.MULTILINE)
    return list(dict.fromkeys(failed))


if __name__ == "__main__":
    sys.exit(main())
