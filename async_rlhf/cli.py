"""The command line. Each command is a thin shell: parse, call `commands`, turn errors into one line and an exit code."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from async_rlhf import __version__
from async_rlhf.commands.application import config_of, require_application
from async_rlhf.commands.say import say
from async_rlhf.commands.signals import Interrupted
from async_rlhf.errors import AsyncRLHFError, ConfigError, RewardError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Asynchronous RLHF on Ray, vLLM and DeepSpeed."
)
Words = Annotated[list[str] | None, typer.Argument(metavar="[CONF.yaml ...] [key=value ...]", help="Config files and overrides.")]
Folder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


@app.command()
def train(
    words: Words = None,
    resume: Annotated[bool, typer.Option("--resume", help="Where run.dir holds a run already, go on with that.")] = False,
) -> None:
    """Train a policy; see conf/quickstart.yaml."""
    from async_rlhf.commands.train import run_or_resume, run_train

    require_application()
    raise typer.Exit((run_or_resume if resume else run_train)(config_of(words), Console()))


@app.command()
def resume(
    run: Folder,
    words: Words = None,
    checkpoint: Annotated[int | None, typer.Option(help="Version of the checkpoint to go on from; default: the newest whole one.")] = None,
) -> None:
    """Go on with a run that was interrupted, killed or failed; other settings may be given."""
    from async_rlhf.commands.resume import run_resume

    require_application()
    raise typer.Exit(run_resume(run, words or [], checkpoint, Console()))


@app.command()
def replay(
    run: Folder,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings other than the run's own.")] = None,
    until: Annotated[int | None, typer.Option(help="Stop after so many updates; default: all.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="With the run's metrics and digests; exit code 1 where one differs.")] = False,
) -> None:
    """Train a run's batches once more, without generators: the same numbers again, bit for bit, on the CPU."""
    from async_rlhf.commands.replay import run_replay

    require_application()
    raise typer.Exit(run_replay(run, overrides or [], until, compare, Console()))


@app.command()
def sft(
    words: Words = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the model; default, for a built-in task: the cache.")] = None,
) -> None:
    """Make the task's supervised start, or fine-tune model.path on sft.sources."""
    from async_rlhf.commands.sft import run_sft

    require_application()
    run_sft(config_of(words), out, Console(), in_process=False)


@app.command(name="reward-model")
def reward_model(
    words: Words = None, out: Annotated[Path | None, typer.Option(help="Folder of the reward model; default: the cache.")] = None
) -> None:
    """Train a reward model on preference pairs."""
    from async_rlhf.commands.reward_model import run_reward_model

    require_application()
    run_reward_model(config_of(words), out, Console(), in_process=False)


@app.command()
def relabel(
    out: Annotated[Path, typer.Option(help="The new preference set, a .parquet file.")],
    words: Words = None,
) -> None:
    """Order the pairs of a preference set anew, by the config's reward."""
    from async_rlhf.commands.relabel import run_relabel

    require_application()
    run_relabel(config_of(words), out, Console())


@app.command(name="eval")
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL|RUN", help="A Hugging Face model folder, or a run folder: its final policy.")],
    words: Words = None,
    against: Annotated[str, typer.Option(metavar="MODEL|references", help="Whom to compare with: adds a win-rate.")] = "",
    judge: Annotated[bool, typer.Option("--judge", help="The judge of evaluation.judge decides; default: the higher score.")] = False,
    reference: Annotated[Path | None, typer.Option(help="Model folder to measure the KL to; default: the start of RUN.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Greedy completions only.")] = False,
    samples: Annotated[int, typer.Option(min=0, help="Completions to print.")] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON file for everything that was found.")] = None,
) -> None:
    """Scores, win-rate and KL of a model on held-out prompts, with intervals."""
    from async_rlhf.commands.evaluate import Wishes, run_evaluate

    require_application()
    wishes = Wishes(against=against, judge=judge, reference=reference, greedy=greedy, samples=samples, out=out)
    raise typer.Exit(run_evaluate(model, words or [], wishes, Console()))


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(metavar="MODEL|RUN", help="A Hugging Face model folder, or a run folder: its final policy.")],
    words: Words = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; again for more.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt per line; -: standard input.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are a user's turns, for the model's chat template.")] = False,
    samples: Annotated[int, typer.Option(min=1, help="Completions of each prompt.")] = 1,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0: greedy; default: generator.temperature.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON lines instead: prompt, completion, tokens, log-probabilities.")] = None,
) -> None:
    """What a policy answers to prompts of yours."""
    from async_rlhf.commands.generate import Questions, run_generate

    require_application()
    questions = Questions(prompts=tuple(prompt or ()), file=prompts, chat=chat, num_samples=samples, temperature=temperature)
    run_generate(model, words or [], questions, out, Console())


@app.command(name="export")
def export_(
    run: Folder,
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: RUN/export/VERSION.")] = None,
    checkpoint: Annotated[int | None, typer.Option(help="Version; default: the finished model, else the newest checkpoint.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="The adapters of a LoRA run alone, for PEFT.")] = False,
) -> None:
    """Write a policy as a Hugging Face folder, also from a checkpoint of a run that goes on."""
    from async_rlhf.commands.export import run_export

    require_application()
    run_export(run, out, checkpoint, adapter, Console())


@app.command()
def status(run: Folder) -> None:
    """Where a run stands: from its TrainingState actor while it lives, else from its folder."""
    from async_rlhf.commands.status import run_status

    run_status(run, Console())


@app.command()
def scale(
    run: Folder,
    words: Annotated[list[str] | None, typer.Argument(metavar="generators=N", help="How many the run shall have.")] = None,
    timeout: Annotated[float, typer.Option(help="Longest wait, seconds; 0: what the run's own deadlines allow.", min=0.0)] = 0.0,
) -> None:
    """Have a living run take on more generators, or fewer, while it trains on."""
    from async_rlhf.commands.scale import run_scale

    run_scale(run, words or [], timeout, Console())


@app.command()
def report(run: Folder) -> None:
    """Write the run's report again: one self-contained HTML page."""
    from async_rlhf.report import write_report

    say(Console(), f"report: {write_report(run)}")


@app.command()
def plan(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN ...] [CONF.yaml ...] [key=value ...]", help="A run to measure; several: their mean.")
    ] = None,
    rates: Annotated[Path | None, typer.Option(help="YAML file of rates instead of measured ones.")] = None,
    generators: Annotated[str, typer.Option(help="Numbers to compare, for instance 1,2,4; default: 1, 2 and 4 times the config's.")] = "",
    ranks: Annotated[str, typer.Option(help="Likewise; default: the config's.")] = "",
    bounds: Annotated[str, typer.Option(help="Values of max_staleness, likewise.")] = "",
    gpus: Annotated[int, typer.Option(min=0, help="Recommend a split of so many GPUs.")] = 0,
    cores: Annotated[int, typer.Option(min=0, help="Recommend a split of so many CPU cores.")] = 0,
    shared_cores: Annotated[int, typer.Option(min=0, help="All processes share this machine's so many cores; 0: each has its own.")] = 0,
    median_tokens: Annotated[float, typer.Option(min=0.0, help="Log-normal lengths instead of the run's.")] = 0.0,
    sigma: Annotated[float, typer.Option(min=0.0, help="Of their logarithm.")] = 0.5,
    prompt_tokens: Annotated[float, typer.Option(min=0.0, help="Mean length of the prompts beside them.")] = 0.0,
    json: Annotated[Path | None, typer.Option(help="File for everything that was predicted.")] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG file: updates per hour over generators.")] = None,
) -> None:
    """Predict throughput, idle shares and staleness for other numbers of generators and ranks; recommend a split of a budget."""
    from async_rlhf.commands.plan import Wishes, run_plan

    wishes = Wishes(
        rates=rates,
        generators=generators,
        ranks=ranks,
        bounds=bounds,
        gpus=gpus,
        cores=cores,
        shared_cores=shared_cores,
        median_tokens=median_tokens,
        sigma=sigma,
        prompt_tokens=prompt_tokens,
        json=json,
        plot=plot,
    )
    run_plan(words or [], wishes, Console())


@app.command()
def dashboard(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[RUN ...]", help="Run folders; none: those under ./runs.")] = None,
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 0,
    open_browser: Annotated[bool, typer.Option("--open", help="Open a browser.")] = False,
) -> None:
    """A live page about one run, or several compared; for a browser on this machine."""
    from async_rlhf.commands.dashboard import run_dashboard

    run_dashboard(runs or [], port, Console(), open_browser=open_browser)


@app.command(name="serve-reward")
def serve_reward(
    words: Words = None,
    function: Annotated[str, typer.Option(help="module:function or file.py:function instead of a config.")] = "",
    model: Annotated[Path | None, typer.Option(help="Folder of a reward model instead of a config.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's own need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 0,
    max_request_mib: Annotated[float, typer.Option(help="Largest request.", min=0.001)] = 64.0,
) -> None:
    """Serve a reward by HTTP; ASYNC_RLHF_REWARD_TOKEN in the environment is the token that callers must send."""
    from async_rlhf.commands.serve_reward import Place, run_serve_reward

    run_serve_reward(words or [], function, model, Place(host=host, port=port, max_request_mib=max_request_mib), Console())


@app.command()
def config(words: Words = None) -> None:
    """Print the resolved config and where each value came from."""
    from async_rlhf.commands.config import run_config
    from async_rlhf.config.load import split_arguments

    run_config(*split_arguments(words or []), Console())


@app.command()
def doctor(
    runs: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where run folders will be.")] = Path("runs"),
) -> None:
    """Whether this machine, what is installed on it, and its Ray are fit for a run."""
    from async_rlhf.commands.doctor import run_doctor

    require_application()
    raise typer.Exit(run_doctor(runs.resolve(), Console()))


@app.command()
def version() -> None:
    """Print the version."""
    Console().print(__version__, highlight=False)


def main() -> None:
    """Entry point: user errors are one line on stderr and exit code 2, other failures of a run exit code 1."""
    try:
        app()
    except (ConfigError, RewardError) as error:
        _fail(error, 2)
    except Interrupted as error:
        _fail(error, error.code)
    except AsyncRLHFError as error:
        _fail(error, 1)


def _fail(error: Exception, code: int) -> None:
    say(Console(stderr=True), f"error: {error}", style="bold red")
    sys.exit(code)


if __name__ == "__main__":
    main()
