"""Ahead: rows of later stages, encoded while a stage trains.

The tokens of a row depend on a policy's tokenizer and chat contract, not on its weights, and both are decided where a chain
begins and travel unchanged. So while one stage trains, one process of the lowest priority puts into the cache of prepared
data what `prepare` of a later stage will look up there. It decides nothing: `prepare` runs all the same, finds an entry by
content alone, checks it and says what is wrong; what is missing, it makes.
"""

import tempfile
from pathlib import Path
from typing import Any

from posttrain.data.prepared import prepare
from posttrain.error import Preempted
from posttrain.ledger import Attempt, Foreseen, foreseen
from posttrain.models import load_tokenizer
from posttrain.preflight import fatal_faults
from posttrain.recipe import TrainingConfig
from posttrain.stage import Input, StageContext


def prepare_ahead(directory: Path, attempt: Attempt) -> None:
    """Encode the rows of the stages that the attempt at the stage in `directory` foresees. What is wrong is only printed."""
    for later in foreseen(attempt):
        try:
            with tempfile.TemporaryDirectory(prefix="ahead.", dir=attempt.logs(directory)) as scratch:
                _prepare(later, Path(scratch), Path(attempt.root))
            print(f"{later.name}: prepared", flush=True)
        except Preempted:
            raise
        except Exception as error:  # of whatever kind: the stage meets it again when it prepares, and tells the user then
            print(f"{later.name}: not prepared: {type(error).__name__}: {error}", flush=True)


def _prepare(later: Foreseen, scratch: Path, root: Path) -> None:
    context: StageContext[Any] = StageContext(later.name, later.config, {"policy": (later.policy,), "data": (later.data,)}, scratch, root)
    config: TrainingConfig = context.config
    policy = later.policy if later.contract is None else _foretell(later.policy, later.contract, scratch / "policy", context.at)
    tokenizer, contract = load_tokenizer(policy, context.at, chat_template=config.chat_template, system_prompt=config.system_prompt)
    assert later.stage.encoder is not None, "only stages that train on rows are foreseen"
    encoder = later.stage.encoder(config, tokenizer, contract, context.at)
    prepare(context, later.data, encoder, fatal=fatal_faults(config.preflight), num_processes=1)


def _foretell(above: Input, settings: dict[str, str | None], directory: Path, at: str) -> Input:
    """Tokenizer and contract of a policy that is yet to be made from `above`, written and read as they will be published."""
    tokenizer, contract = load_tokenizer(above, at, chat_template=settings["chat_template"], system_prompt=settings["system_prompt"])
    tokenizer.save_pretrained(directory)
    contract.save(directory)
    return Input(above.name, "policy", "", above.model.model_copy(update={"model": str(directory), "revision": None}))
