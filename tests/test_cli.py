"""The command line: what it says, where it says it, and its exit codes."""

import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from tinygpt.api import GPT
from tinygpt.cli import GROUPS, VERBS, main, make_app
from tinygpt.cli.console import command
from tinygpt.cli.flags import proof_first, undotted
from tinygpt.cli.options import CONFIGS, DataConfig, file_tables, preset_tables, resolve
from tinygpt.config import PRESETS, GPTConfig, TrainConfig, __version__, field_docs
from tinygpt.errors import ConfigError, DeviceError
from tinygpt.generation.stream import first_prompt
from tinygpt.text.tokenizers import ByteTokenizer, CharTokenizer

TEXT = "the cat sat on the mat, and the dog sat on the log.\n" * 40
TINY = shlex.split(
    "--tokenizer char --n-layer 1 --n-embd 8 --n-head 1 --block-size 8"
    " --batch-size 2 --eval-iters 1 --warmup-steps 0"
)
SHORT = [*TINY, "--max-iters", "4", "--eval-interval", "2"]


@pytest.fixture
def run_cli(capsys, monkeypatch):
    """Call the program; -> exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/tinygpt"])

    def call(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "cats.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory):
    """A run folder, made once by the command line itself."""
    folder = tmp_path_factory.mktemp("runs") / "cats"
    assert main(["train", str(text_file), *SHORT, "--out", str(folder)]) == 0
    return folder


def python(code, env, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)


# Starting ---------------------------------------------------------------------------------------


def test_help_imports_neither_tinygrad_nor_numpy(child_environment):
    code = (
        "import sys; from tinygpt.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'tinygrad', 'numpy', 'requests', 'tiktoken', 'safetensors', 'matplotlib'};"
        "print(code, sorted(heavy & sys.modules.keys()))"
    )
    for arguments in (["--help"], ["train", "--help"], ["chat", "--help"], ["--version"]):
        done = python(code, child_environment, *arguments)
        assert done.stdout.splitlines()[-1] == "0 []", (arguments, done.stderr)


def test_python_m_tinygpt_is_the_program(child_environment):
    done = subprocess.run(
        [sys.executable, "-m", "tinygpt", "--version"],
        capture_output=True,
        text=True,
        env=child_environment,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, f"tinygpt {__version__}\n")


@pytest.mark.parametrize("name", ["tinygpt", "minimiggy"])
def test_the_program_goes_by_the_name_it_was_called_with(run_cli, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{name}"])
    assert f"Usage: {name} COMMAND" in run_cli("--help")[1]
    assert run_cli("--version")[1] == f"{name} {__version__}\n"
    assert run_cli("bogus")[2].startswith(f"{name}: error: ")
    assert f"Try: {name} train --help" in run_cli("train", "--bogus")[2]


def test_help_lists_every_verb(run_cli):
    code, out, _ = run_cli("--help")
    assert code == 0
    parts = [part.split(maxsplit=1) for part in out.split("╭─ ")[1:]]
    shown = {head: re.findall(r"^│ (\S+) ", rest, re.M) for head, rest in parts}
    assert shown == shown | {
        "Everyday": ["train", "generate", "chat", "serve", "dashboard"],
        "Runs": ["runs", "info", "compare", "plot", "eval", "eval-chat", "verify"],
        "Exchange": ["import", "export", "make-chats", "tokenize", "tokenizer"],
        "Proofs": ["doctor", "memorization"],
        "Shell": ["completion"],
    }
    assert all(verb in VERBS for group in GROUPS for verb in shown[group])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_keeps_the_promise_of_its_summary(run_cli, verb):
    code, out, _ = run_cli(verb, "--help")
    assert code == 0 and f"Usage: tinygpt {verb}" in out
    assert make_app(verb=verb)[verb].help.strip()


def test_every_config_field_is_a_flag_with_its_documentation(run_cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    out = run_cli("train", "--help")[1]
    for config in (GPTConfig, TrainConfig):
        for name, doc in field_docs(config).items():
            flag = f"--{name.replace('_', '-')}"
            assert re.search(rf"{flag} .*{re.escape(doc)}", out), flag
    assert all(preset in out for preset in PRESETS)


def test_no_two_settings_share_a_name_and_the_dotted_flags_are_other_names_of_them():
    names = [name for config in CONFIGS.values() for name in field_docs(config)]
    assert len(names) == len(set(names))
    words = ["--train.max-iters", "5", "--model.no-bias", "--model.n-layer=3", "--train.max-iter"]
    assert undotted([*words, "--", "--train.seed"]) == [
        *("--max-iters", "5", "--no-bias", "--n-layer=3", "--max-iter", "--", "--train.seed")
    ]


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("doctor --json --kernels adamw", "doctor --kernels --json adamw"),
        ("doctor --json", "doctor --json"),
        ("train --json --resume", "train --json --resume"),
        ("", ""),
    ],
)
def test_a_proof_may_stand_anywhere(given, taken):
    assert proof_first(given.split()) == taken.split()


def test_the_options_of_every_command_are_in_the_help_of_each(run_cli):
    for words in (["--help"], ["train", "--help"], ["export", "web", "--help"]):
        out = run_cli(*words)[1]
        assert all(re.search(rf"│ {flag} ", out) for flag in ("--threads", "--strict", "--debug"))


PROOFS = {"--kernels": "check", "--gradients": "gradcheck", "--resume": "verify-resume"}


@pytest.mark.parametrize("proof, verb", PROOFS.items())
def test_a_proof_has_two_names(run_cli, proof, verb):
    new, old = run_cli("doctor", proof, "--help")[1], run_cli(verb, "--help")[1]
    assert new.startswith(f"Usage: tinygpt doctor {proof} ")
    assert new.split("\n")[1:] == old.split("\n")[1:]


# Wrong use --------------------------------------------------------------------------------------

WRONG_USE = {
    "train a.txt --n-layr 3": "Did you mean --n-layer?",
    "train a.txt --model.n-layr 3": "Did you mean --n-layer?",
    "train a.txt --lr 3": "Unknown option: --lr. Did you mean --learning-rate?",
    "train a.txt --epochs=3": "Unknown option: --epochs. Did you mean --max-iters?",
    "train a.txt --steps 3": "Did you mean --max-iters?",
    "train a.txt --layers 3": "Did you mean --n-layer?",
    "train a.txt --dropout_rate 0.1": "Did you mean --dropout?",
    "generate run --max-new-tokens 5": "Did you mean --max-tokens?",
    "generate run --lr 3": "Unknown option: --lr.",
    "sample run": "Unknown command 'sample'. Did you mean 'generate'?",
    "train a.txt --threads": "--threads needs a value.",
    "train a.txt --threads many": 'unable to convert "many" into int',
    "train a.txt --threads -1": "Must be >= 0",
    "train a.txt --optimizer sgd": '"adam", "muon"',
    "trian a.txt": 'Did you mean "train"?',
    "train a.txt b.txt": "Unexpected argument 'b.txt'.",
    "train a.txt --seed": "--seed needs a value.",
    "train a.txt --max-iters many": 'unable to convert "many" into int',
    "train a.txt --decay exponential": '"cosine", "linear", "sqrt", "constant"',
    "train a.txt --max-iters 9 --n-embd 130": "130 is not divisible by n_head=4. Try n_embd=128",
    "train a.txt --n-layer 0": "n_layer=0 is too small",
    "train a.txt --n-layer -2": "n_layer=-2 is too small",
    "train a.txt --n-embd 1000000000": "more than the",
    "train a.txt --learning-rate nan": "learning_rate=nan is not a finite number",
    "train a.txt --val-fraction 1.5": "val_fraction=1.5 is out of range",
    "train a.txt --preset demmo": "There is no preset 'demmo'. Did you mean 'demo'?",
    "train": "There is no text to learn from. Try: tinygpt train auto",
    "train --resume": "--resume needs --out",
    "generate run --temperature -1": "temperature=-1.0 is too small",
    "generate run --temperature nan": "temperature=nan is not a finite number",
    "generate run --top-k 0": "top_k=0 is too small",
    "generate run --top-p 2": "top_p=2.0 is out of range",
    "generate run -n 0": "must be at least 1",
    "generate run --prompt ''": "The prompt is empty",
    "generate run -i --prompt x": "-i asks for the prompts itself",
    "eval run --batch-size 0": "must be at least 1",
    "plot nowhere": "There is no run at nowhere",
    "tokenizer train a.txt": "--out is missing.",
    "tokenizer encode bpe:300 x": "has to be trained first",
    "tokenizer decode byte one": 'unable to convert "one" into int',
    "gradcheck --batch-size 0": "must be at least 1",
}


@pytest.mark.parametrize("line", WRONG_USE)
def test_wrong_use_is_told_on_stderr_with_exit_code_2(run_cli, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no run that could be taken
    code, out, err = run_cli(*shlex.split(line))
    assert code == 2, err
    assert out == ""
    assert err.startswith("tinygpt: error: ") and WRONG_USE[line] in err


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "There is no file or folder"),
        (b"", "holds no text"),
        (b"\x80\x81 text", "is not UTF-8"),
        (b"\x00\x01\x02" * 100, "is not a text file"),
        (b"abc", "too short"),
    ],
)
def test_bad_text_is_a_failure_that_says_why(run_cli, tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    code, out, err = run_cli("train", path, *SHORT, "--out", tmp_path / "run")
    assert (code, out) == (1, "")
    assert message in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error, code, message",
    [
        (DeviceError("no compiler: install one"), 1, "tinygpt: error: no compiler: install one\n"),
        (MemoryError(), 1, "--batch-size"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: /x: Permission denied.\n"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device.\n"),
        (ZeroDivisionError("by zero\x1b[2J"), 1, "ZeroDivisionError: by zero␛[2J\nThis should not"),
        (KeyboardInterrupt(), 130, "tinygpt: interrupted\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_no_exception_becomes_a_traceback(run_cli, monkeypatch, error, code, message):
    def fail():
        raise error

    monkeypatch.setattr("tinygpt.machine.doctor.examine", fail)
    found, out, err = run_cli("doctor")
    assert (found, out) == (code, "")
    assert message in err


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_debug_shows_the_traceback(monkeypatch, how):
    monkeypatch.setattr("tinygpt.machine.doctor.examine", lambda: 1 / 0)
    monkeypatch.setenv("TINYGPT_DEBUG", "1" if how == "environment" else "0")
    with pytest.raises(ZeroDivisionError):
        main(["doctor", "--debug"] if how == "flag" else ["doctor"])


def test_a_reader_that_goes_away_is_no_error(child_environment):
    program = f"{shlex.quote(sys.executable)} -m tinygpt train --print-config"
    command = f"{program} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=child_environment, timeout=60
    )
    assert done.stderr == ""
    assert done.stdout.strip() in ("141", "0")  # 0 if it was written before the reader left


# Settings ---------------------------------------------------------------------------------------


def printed_config(run_cli, *arguments):
    code, out, err = run_cli("train", *arguments, "--print-config")
    assert (code, err) == (0, "")
    return tomllib.loads(out), out


def test_later_settings_win_over_earlier_ones(run_cli, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[model]\nn_layer = 7\nn_head = 2\n[train]\nmax_iters = 77\nseed = 5\n")
    found, _ = printed_config(
        run_cli, "--preset", "baby", "--config", file, "--seed", "9", "--n-head", "1"
    )
    assert found["train"]["seed"] == 9 and found["model"]["n_head"] == 1  # flags
    assert found["train"]["max_iters"] == 77 and found["model"]["n_layer"] == 7  # the file
    assert found["train"]["batch_size"] == 12 and found["data"]["tokenizer"] == "char"  # preset
    assert found["train"]["eps"] == 1e-8 and found["data"]["val_fraction"] == 0.1  # defaults


def test_a_config_that_an_editor_gave_a_byte_order_mark_is_read(run_cli, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[train]\nmax_iters = 77\n", encoding="utf-8-sig", newline="\r\n")
    assert printed_config(run_cli, "--config", file)[0]["train"]["max_iters"] == 77


def test_a_flag_can_unset_what_a_file_has_set(run_cli, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[train]\nearly_stop_patience = 3\n")
    assert printed_config(run_cli, "--config", file)[0]["train"]["early_stop_patience"] == 3
    found, _ = printed_config(run_cli, "--config", file, "--early-stop-patience", "none")
    assert "early_stop_patience" not in found["train"]


def test_switches_can_be_turned_off(run_cli):
    assert printed_config(run_cli, "--no-bias")[0]["model"]["bias"] is False


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_a_printed_config_is_complete_and_means_the_same_when_read(run_cli, tmp_path, preset):
    flags = ["--preset", preset] if preset else ["--max-iters", "1000"]
    flags += ["--sample-prompt", 'Once "upon"\n\t\\ 😀 a\x7ftime', "--field", "body"]
    found, text = printed_config(run_cli, "corpus.jsonl", *flags)
    assert found["train"]["sample_prompt"] == 'Once "upon"\n\t\\ 😀 a\x7ftime'
    file = tmp_path / "c.toml"
    file.write_text(text)
    assert printed_config(run_cli, "--config", file)[1] == text
    for name in (*field_docs(GPTConfig), *field_docs(TrainConfig), *field_docs(DataConfig)):
        assert re.search(rf"^(# )?{name} (= |is not set)", text, re.MULTILINE), name


def test_the_vocabulary_size_comes_from_the_tokenizer_unless_it_is_given(run_cli):
    found, text = printed_config(run_cli)
    assert "vocab_size" not in found["model"] and "# vocab_size = from the tokenizer" in text
    assert printed_config(run_cli, "--vocab-size", "99")[0]["model"]["vocab_size"] == 99
    settings = resolve({"model": {"vocab_size": 99}})
    assert settings.model_config(65).vocab_size == 99
    assert resolve().model_config(65).vocab_size == 65
    with pytest.raises(ConfigError, match="vocab_size=99 is smaller than the tokenizer's 256"):
        settings.model_config(256)


@pytest.mark.parametrize(
    "content, message",
    [
        ("[model]\nn_layr = 3", "no field 'n_layr'. Did you mean 'n_layer'?"),
        ("[modle]\nn_layer = 3", "no table [modle]. Did you mean 'model'?"),
        ("n_layer = 3", "'n_layer' belongs under [model]."),
        ("[model]\nn_layer = '3'", "n_layer='3' is of type str; wanted int."),
        ("[model]\nn_layer = ", "is not a TOML file"),
        (b"\xff\xfe", "is not a TOML file"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_config_file_is_wrong_use(run_cli, tmp_path, content, message):
    file = tmp_path / "c.toml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = run_cli("train", "--config", file, "--print-config")
    assert (code, out) == (2, "")
    assert message in err


def test_values_of_a_file_are_judged_together_with_the_flags(tmp_path):
    (tmp_path / "c.toml").write_text("[model]\nn_embd = 130\n")
    tables = file_tables(tmp_path / "c.toml")
    assert resolve(tables, {"model": {"n_head": 5}}).model["n_embd"] == 130
    with pytest.raises(ConfigError, match="130 is not divisible"):
        resolve(tables)


def test_what_is_yet_to_be_planned_need_not_agree_with_what_is_given():
    given = {"model": {"n_head": 5}, "train": {"devices": "3"}}
    found = resolve(given, planned=True)
    assert found.model == {"n_head": 5} and found.train.batch_size == 24
    with pytest.raises(ConfigError, match="does not divide by the 3 devices"):
        resolve(given, {"train": {"batch_size": 8}}, planned=True)
    with pytest.raises(ConfigError, match="128 is not divisible"):
        resolve(given, {"model": {"n_embd": 128}}, planned=True)


def test_presets_resolve():
    for name, preset in PRESETS.items():
        settings = resolve(preset_tables(name))
        assert settings.data.tokenizer == preset.tokenizer
        assert settings.train.max_iters == preset.train["max_iters"]


# Training ---------------------------------------------------------------------------------------


def test_training_leaves_a_run_folder(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.toml", "metrics.jsonl", "samples.jsonl", "tokenizer.json"} <= names
    assert {"ckpt_2.safetensors", "ckpt_4.safetensors"} <= names
    config = tomllib.loads((trained / "config.toml").read_text())
    assert config["model"]["n_embd"] == 8 and config["train"]["max_iters"] == 4
    assert Path(config["data"]["source"]).is_absolute()


def test_an_existing_run_is_not_overwritten(run_cli, trained, text_file):
    before = (trained / "metrics.jsonl").read_bytes()
    code, _, err = run_cli("train", text_file, *SHORT, "--out", trained)
    assert code == 2
    assert f"tinygpt train --resume --out {trained}" in err
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_resuming_where_there_is_no_run_is_a_failure(run_cli, tmp_path):
    code, _, err = run_cli("train", "--resume", "--out", tmp_path)
    assert code == 1 and "There is no run in" in err


def test_resuming_a_finished_run_does_nothing_more(run_cli, trained):
    code, out, err = run_cli("train", "--resume", "--out", trained, "--json")
    summary = json.loads(out)
    assert code == 0 and summary["iter"] == 4 and summary["stopped"] is False
    assert "step 4/4" not in err and "done, 4 steps" in err


def test_ctrl_c_keeps_everything_and_says_how_to_go_on(run_cli, text_file, tmp_path, monkeypatch):
    from tinygpt.runs.display.plain import PlainDisplay

    update = PlainDisplay.update

    def interrupting(self, step):
        update(self, step)
        if step.iter == 3:
            os.kill(os.getpid(), signal.SIGINT)

    folder = tmp_path / "a run"
    monkeypatch.setattr(PlainDisplay, "update", interrupting)
    flags = [*TINY, "--max-iters", "8", "--eval-interval", "4"]
    code, out, err = run_cli("train", text_file, *flags, "--out", folder, "--json")
    summary = json.loads(out)
    assert code == 130 and summary["stopped"] is True
    assert Path(summary["checkpoint"]).is_file()
    advice = f"tinygpt train --resume --out {shlex.quote(str(folder))}"
    assert err.splitlines()[-1].strip() == advice

    code, out, err = run_cli(*shlex.split(advice)[1:], "--json")
    resumed = json.loads(out)
    assert code == 0 and resumed["iter"] == 8 and resumed["stopped"] is False
    assert f"from step {summary['iter']}" in err
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["iter"] for row in rows] == list(range(1, 9))


# Text out ---------------------------------------------------------------------------------------


@pytest.fixture
def generate(run_cli, trained):
    def call(*arguments):
        return run_cli("generate", trained, "--max-tokens", "12", "--seed", "1", *arguments)

    return call


def test_the_printed_commands_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tinygpt"])
    for path in ("my run", "it's", "-run", "a;b", "诗"):
        words = shlex.split(command("generate", Path(path)))
        assert words[:2] == ["tinygpt", "generate"] and not words[2].startswith("-")
        assert Path(words[2]) == Path(path)
    name = b"it's caf\xe9\\"
    line = command("generate", Path(os.fsdecode(name))).replace("tinygpt generate", "printf %s", 1)
    assert subprocess.run(["bash", "-c", line], capture_output=True).stdout == name


def test_a_vocabulary_without_a_line_break_can_be_generated_with_as_is_printed(run_cli, tmp_path):
    folder = tmp_path / "my run"
    tokenizer = CharTokenizer("abc")
    GPT(GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=1, n_embd=8)).save_checkpoint(
        0, folder=folder, tokenizer=tokenizer
    )
    code, out, err = run_cli("generate", folder, "--max-tokens", "4")
    assert (code, err) == (0, "") and set(out.rstrip("\n")) <= set("abc") and len(out) == 6
    assert first_prompt(tokenizer) == "a" and first_prompt(ByteTokenizer()) == "\n"


def test_text_is_written_to_stdout_with_its_prompt(generate):
    code, out, err = generate("--prompt", "the cat")
    assert (code, err) == (0, "")
    assert out.startswith("the cat") and len(out) == len("the cat") + 12 + 1
    assert generate("--prompt", "the cat", "--no-echo")[1] == out.removeprefix("the cat")
    assert generate("--prompt", "the cat")[1] == out  # the same seed, the same text


def test_several_texts_differ_and_the_first_is_the_single_one(generate):
    first = generate("--prompt", "the")[1]
    out = generate("--prompt", "the", "-n", "2")[1]
    texts = out.split(f"\n{'-' * 20}\n")
    assert texts[0] == first and texts[1].startswith("the") and texts[1] != texts[0] + "\n"
    answer = json.loads(generate("--prompt", "the", "-n", "2", "--json")[1])
    assert answer["prompt"] == "the" and answer["seed"] == 1
    assert ["the" + text + "\n" for text in answer["texts"]] == texts


def test_a_stop_string_ends_the_text_and_is_left_out(generate):
    text = json.loads(generate("--prompt", "the", "--json")[1])["texts"][0]
    stop = text[3:5]
    ended = json.loads(generate("--prompt", "the", "--json", "--stop", "zzz", "--stop", stop)[1])
    assert ended["texts"] == [text[: text.index(stop)]]


def test_the_prompt_can_come_from_stdin(generate, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the dog")))
    assert generate("--prompt", "-")[1].startswith("the dog")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the dog")))
    assert generate("-")[1].startswith("the dog")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    code, _, err = generate("--prompt", "-")
    assert code == 1 and "not UTF-8" in err


def test_interactive_prompts_survive_a_wrong_one(generate, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n\n€\nthe dog\n"))
    code, out, err = generate("-i")
    assert code == 0
    assert "the cat" in out and "the dog" in out
    assert err.count("error: The character '€'") == 1


def test_a_prompt_outside_the_vocabulary_is_a_failure(generate):
    code, out, err = generate("--prompt", "€")
    assert (code, out) == (1, "") and "'€'" in err


def test_a_missing_run_is_a_failure(run_cli, tmp_path):
    for verb in ("generate", "eval", "info"):
        code, _, err = run_cli(verb, tmp_path / "nowhere")
        assert code == 1 and "There is no checkpoint" in err


def test_a_file_that_is_no_checkpoint_is_a_failure(run_cli, tmp_path):
    file = tmp_path / "ckpt_1.safetensors"
    file.write_bytes(b"\x80\x04pickled")
    for verb in ("generate", "eval", "info"):
        code, _, err = run_cli(verb, file)
        assert code == 1 and str(file) in err


def test_a_terminal_gets_no_control_characters(monkeypatch):
    from tinygpt.cli.console import emit

    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    emit("a\x1b[2J")
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    emit("a\x1b[2J")
    assert stream.getvalue() == "a\x1b[2Ja␛[2J"


# Measuring and looking --------------------------------------------------------------------------


def test_eval_measures_every_token_but_the_first(run_cli, trained, text_file):
    flags = ["--data", text_file, "--batch-size", "2", "--json"]
    code, out, _ = run_cli("eval", trained, *flags)
    found = json.loads(out)
    assert code == 0 and found["tokens"] == len(TEXT) - 1
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_eval_takes_the_runs_own_validation_text(run_cli, trained):
    code, out, _ = run_cli("eval", trained, "--batch-size", "2")
    assert code == 0 and "cats.txt" in out and "its last 10%" in out
    assert re.search(rf"tokens +{len(TEXT) - int(len(TEXT) * 0.9) - 1}\n", out)


def test_info_shows_what_a_run_holds(run_cli, trained):
    code, out, _ = run_cli("info", trained)
    assert code == 0
    for part in ("step        4", "tokenizer   char", "optimizer   yes", "[train]", "best"):
        assert part in out
    assert r"sample_prompt        '\n'" in out
    described = json.loads(run_cli("info", trained / "ckpt_2.safetensors", "--json")[1])
    assert described["iter_num"] == 2 and "model.wte.weight" in described["tensors"]


def test_plot_draws_a_run(run_cli, trained, tmp_path):
    out = tmp_path / "curves.svg"
    code, drawn, err = run_cli("plot", trained, "--out", out)
    assert (code, drawn) == (0, "") and str(out) in err and out.stat().st_size > 1000
    assert "validation, best" in run_cli("plot", trained)[1]


def test_gradcheck_fails_past_the_tolerance(run_cli, monkeypatch):
    from tinygpt.training.gradcheck import GradcheckReport, GradcheckRow

    shapes = []

    def report(error):
        def check(model, idx, targets, **settings):
            shapes.append((model.config.n_layer, idx.shape, settings))
            row = GradcheckRow("wte.weight", (2, 3), 1.0, error, 0.0, error <= 1e-5)
            return GradcheckReport((row,), 1e-5, 1e-3, 1.0)

        return check

    flags = ["gradcheck", "--n-layer", "1", "--batch-size", "3", "--seed", "5"]
    monkeypatch.setattr(import_module("tinygpt.training.gradcheck"), "gradcheck", report(1e-4))
    code, out, _ = run_cli(*flags)
    assert code == 1 and "WRONG" in out
    monkeypatch.setattr(import_module("tinygpt.training.gradcheck"), "gradcheck", report(1e-7))
    code, out, _ = run_cli(*flags, "--json")
    assert code == 0 and json.loads(out)["ok"] is True
    assert shapes == [(1, (3, 8), {"samples": 3, "seed": 5, "dtype": "float32"})] * 2


def test_doctor_fails_only_for_what_is_needed(run_cli, monkeypatch):
    from tinygpt.machine.doctor import Check

    python, plots = (
        Check("python", True, "3.11"),
        Check("plots", False, "-", "get it", optional=True),
    )
    compiler = Check("compiler", False, "none", "python -m pip install clang")
    monkeypatch.setattr("tinygpt.machine.doctor.examine", lambda: [python, plots])
    monkeypatch.setattr("tinygpt.machine.doctor.time_devices", lambda: [])
    timing = import_module("tinygpt.kernels.check.gains")
    monkeypatch.setattr(timing, "gains", lambda: timing.Gains(1.62, 1.9, "by conversion"))
    code, out, _ = run_cli("doctor")
    assert code == 0 and "optional" in out and "get it" in out and "MISSING" not in out
    assert "1.6 times the speed of float32" in out and "by conversion" in out
    monkeypatch.setattr(timing, "gains", lambda: 1 / 0)
    code, out, _ = run_cli("doctor")
    assert code == 0 and "could not be timed: ZeroDivisionError" in out
    monkeypatch.setattr("tinygpt.machine.doctor.examine", lambda: [python, compiler])
    code, out, _ = run_cli("doctor")
    assert code == 1 and "MISSING" in out and "python -m pip install clang" in out
    code, out, _ = run_cli("doctor", "--json")
    assert code == 1 and json.loads(out)["checks"][1]["cure"] == compiler.cure


def test_the_cache_can_be_int8(run_cli, trained):
    from tinygpt import load
    from tinygpt.errors import UsageError

    code, out, err = run_cli("generate", trained, "the", "--max-tokens", "5", "--kv", "int8")
    assert code == 0 and out.startswith("the") and "the keys and values of a text take" in err
    code, _, err = run_cli("generate", trained, "the", "--kv", "int4")
    assert code == 2 and "int8" in err
    with pytest.raises(UsageError, match="Wanted: 'int8'"):
        load(trained, kv="int4")


# The tokenizer's own verbs ----------------------------------------------------------------------


def test_a_tokenizer_is_trained_and_round_trips_text(run_cli, text_file, tmp_path, monkeypatch):
    file = tmp_path / "t.json"
    code, _, err = run_cli("tokenizer", "train", text_file, "--vocab-size", "280", "--out", file)
    assert code == 0 and str(file) in err
    ids = run_cli("tokenizer", "encode", file, "the cat 🐈 <|endoftext|>")[1]
    assert len(ids.split()) < len("the cat 🐈 <|endoftext|>".encode())
    assert run_cli("tokenizer", "decode", file, *ids.split())[1] == "the cat 🐈 <|endoftext|>\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(ids.encode())))
    assert run_cli("tokenizer", "decode", file)[1] == "the cat 🐈 <|endoftext|>\n"
    info = json.loads(run_cli("tokenizer", "info", file, "--json")[1])
    assert info["kind"] == "bpe" and info["vocab_size"] <= 280 and " the" in info["longest"]
    assert "fingerprint" in run_cli("tokenizer", "info", "byte")[1]


def test_a_run_is_a_tokenizer_too(run_cli, trained):
    ids = json.loads(run_cli("tokenizer", "encode", trained, "the cat", "--json")[1])
    assert len(ids) == 7


def test_a_text_can_be_encoded_from_stdin(run_cli, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é".encode())))
    assert run_cli("tokenizer", "encode", "byte")[1] == "195 169\n"


def test_ids_outside_the_vocabulary_are_a_failure(run_cli):
    code, _, err = run_cli("tokenizer", "decode", "byte", "300")
    assert code == 1 and "300" in err


def test_a_run_remembers_which_text_auto_chose():
    from tinygpt.cli.options import DataConfig
    from tinygpt.cli.running import _lasting

    assert _lasting(DataConfig(source="auto"), "pydocs").source == "pydocs"
    assert _lasting(DataConfig(source="shakespeare"), "shakespeare").source == "shakespeare"
