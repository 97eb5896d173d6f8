"""A chat template is a program by a stranger: it can reach nothing, and can neither hang nor fill the machine."""

import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from posttrain import sandbox
from posttrain.chat import CHATML, render
from posttrain.error import UserError
from posttrain.sandbox import OverLimit
from tests.security.preparing import Refuse, refuse

__all__ = ["refuse"]

TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
BIG = "{%- set ns = namespace(x='a') %}"
NUMBER = "{%- set ns = namespace(x=3) %}"


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test reaches soon."""
    monkeypatch.setattr(sandbox, "MAX_RENDER_S", 0.3)
    monkeypatch.setattr(sandbox, "MAX_RENDER_BYTES", 256 << 20)


def refusal(tokenizer: Any, template: str) -> str:
    tokenizer.chat_template = template
    with pytest.raises(UserError) as caught:
        render(tokenizer, TALK, None, "x.jsonl:1")
    message = str(caught.value)
    assert message.startswith("x.jsonl:1: the chat template ") and len(message.splitlines()) == 1
    return message


COSTLY = [
    ("loops in loops", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes over 0.3 s"),
    ("loops in a block that is marked", "{% generation %}" + "{% for a in range(9999) %}" * 3 + "{% endfor %}" * 3 + "{% endgeneration %}",
     "takes over"),
    ("a macro that calls itself twice", "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
     "takes over 0.3 s"),
    ("a long text times a number", "{{ 'a' * 100000000000 }}", "takes over 256 MiB"),
    ("a text times a variable", "{% set n = messages | length * 5000000000 %}{{ 'ab' * n }}", "takes over 256 MiB"),
    ("a list times a number", "{{ ([0] * 1000000000) | length }}", "takes over 256 MiB"),
    ("a text doubled over and over", BIG + "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "takes over 256 MiB"),
    ("a list doubled over and over", BIG.replace("'a'", "[1]") + "{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
     "takes over"),
    ("a number squared over and over", NUMBER + "{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}", "takes over"),
    ("a wide field", "{{ 'a' | center(100000000000) }}", "takes over 256 MiB"),
    ("a wide format", "{{ '%1000000000s' | format('a') }}", "takes over 256 MiB"),
    ("an indent", "{{ 'a\nb' | indent(100000000000) }}", "takes over 256 MiB"),
    ("much text", "{% for i in range(9000) %}{{ 'a' * 10000 }}{% endfor %}", "makes 90,000,000 characters"),
    ("a power", "{{ 9 ** 9 }}", "computes a power in line 1"),
    ("a power of variables", "{% set a = 9 %}\n{{ a ** (a ** a) }}", "computes a power in line 2"),
    ("a power by rounding", "{{ 5 | round(-1000000000) }}", "computes a power"),
    ("a power by rounding down", "{{ 1.5 | round(1000000000, 'floor') }}", "computes a power"),
    ("a power by rounding to a variable", "{% set n = 999999999 %}{{ 1.5 | round(n, method='floor') }}", "computes a power"),
    ("a power by rounding each", "{{ [1.5] | map('round', 1000000000, 'floor') | list }}", "computes a power"),
    ("a power by a filter of a name in parts", "{{ [1.5] | map('ro' ~ 'und', 1000000000, 'floor') | list }}", "computes a power"),
    ("a long template", "{# " + "x" * (1 << 20) + " #}", "has 1,048,582 characters"),
]  # fmt: skip


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("template", "said"), [case[1:] for case in COSTLY], ids=[case[0] for case in COSTLY])
def test_a_template_that_takes_too_much_is_refused(tokenizer: Any, template: str, said: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    assert said in refusal(tokenizer, template)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    tokenizer.chat_template = CHATML
    assert render(tokenizer, TALK, None, "x.jsonl:1").startswith("<|im_start|>user"), "and the next one is rendered"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['os'].system('true') }}",
    "{{ namespace.__init__.__globals__ }}{{ namespace.__init__.__globals__.os }}",
    "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.eval_ctx.environment.globals }}",
    "{{ messages | map(attribute='__class__.__mro__') | list | first | first }}{{ (messages | attr('__class__')).mro() }}",
    "{{ '{0.__class__.__mro__[1].__subclasses__}'.format(messages) }}",
    "{% set _ = messages.append(1) %}",
    "{% set _ = messages[0].update({'role': 'system'}) %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('true') }}",
    "{% extends '/etc/passwd' %}",
    "{{ lookup('pipe', 'true') }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ ().__reduce_ex__(2)[0].__globals__ }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_reaches_nothing_beyond_the_conversation(tokenizer: Any, template: str) -> None:
    assert "cannot render it" in refusal(tokenizer, template)


BROKEN = [
    "{% for %}", "{{ messages", "{% if %}{% endif %}", "{{ 1 / 0 }}", "{{ messages[5].content.x }}", "{{ 'a' + 1 }}", "{{ nothing.x }}",
    "{% endif %}", "{{ messages | nonsense }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{% if 1 %}" * 300 + "{% endif %}" * 300, "{{ " + "-" * 20000 + "1 }}",
    "{{ '%d' % 'a' }}", "{{ '%' % 1 }}", "{{ ('9' * 5000) | int + '' }}", "{{ raise_exception('no') }}",
    "{{ '\\ud800'.encode() }}", "{{ '\\ud800' }}",
    "{{ messages | sort }}", "{% for a, b in [1] %}{% endfor %}", "{{ range(10**9) }}", "{{ range(1000000) }}",
]  # fmt: skip


@pytest.mark.parametrize("template", BROKEN, ids=[template[:40] for template in BROKEN])
def test_a_template_that_fails_is_refused_in_one_line(tokenizer: Any, template: str) -> None:
    refusal(tokenizer, template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 2.567 | round(1) }}",
        "{{ [1.2] | map('round') | first }}",
        "{{ messages | map(attribute='role') | join }}",
        "{% macro f(a) %}{{ a.x }}{% endmacro %}{% set d = {'a': {'x': 1}} %}{{ f(**d) }}",
        "{{ '-' * 80 }}",
        "{{ dict(a=1, **{'b': 2}) }}",
        "{% generation %}{{ '**' }}{% endgeneration %}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    ],
)
def test_what_templates_do_is_not_mistaken_for_what_they_may_not(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    assert render(tokenizer, TALK, None, "x")


@pytest.mark.usefixtures("quick")
def test_a_limit_counts_for_each_rendering_not_for_a_conversation_of_many(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_RENDER_S", 0.05)
    tokenizer.chat_template = "{% for a in range(2000) %}{% endfor %}" + CHATML
    with sandbox.Limits("x"):
        for _ in range(200):
            render(tokenizer, TALK, None, "x")


def test_beside_the_main_thread_a_template_is_rendered_too(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    rendered: list[str] = []
    thread = threading.Thread(target=lambda: rendered.append(render(tokenizer, TALK, None, "x")))
    thread.start()
    thread.join()
    assert rendered == [render(tokenizer, TALK, None, "x")]


def test_a_timer_that_was_set_by_others_goes_on(tokenizer: Any) -> None:
    """The clock's timer is what test runners and schedulers use; the limit is one of processor time."""
    before = signal.getitimer(signal.ITIMER_REAL)
    tokenizer.chat_template = CHATML
    render(tokenizer, TALK, None, "x")
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (before[0] > 0)


@pytest.mark.usefixtures("quick")
def test_a_stage_ends_at_the_first_row_even_where_refused_rows_are_allowed(tmp_path: Path, tiny: Path, refuse: Refuse) -> None:
    """Each such row would take as long, and there may be millions."""
    data = tmp_path / "x.jsonl"
    data.write_text('{"prompt": "hang", "completion": "Me."}\n{"prompt": "Who?", "completion": "Me."}\n')
    template = tmp_path / "evil.jinja"
    loop = "{% if messages[0].content == 'hang' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    template.write_text(loop + CHATML.replace("<|im_end|>", "</s>"))
    line = refuse(tiny, data, f"stages.sft.chat_template={template}", "stages.sft.preflight.refused=1.0")
    assert "x.jsonl:1: the chat template takes over 0.3 s to render it" in line


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_template_that_a_model_brings_is_limited_too(tmp_path: Path, tiny: Path, chat_file: Path, refuse: Refuse, place: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = COSTLY[0][1]
    tokenizer.save_pretrained(tmp_path / "model", save_jinja_files=place.endswith("jinja"))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).symlink_to(tiny / name)
    assert "takes over 0.3 s" in refuse(tmp_path / "model", chat_file)


@pytest.mark.parametrize("name", ["folder", "fifo", "missing", "latin-1"])
def test_a_template_file_that_is_none_is_refused_and_not_waited_for(
    tmp_path: Path, tiny: Path, chat_file: Path, refuse: Refuse, name: str
) -> None:
    path = tmp_path / "template"
    if name == "folder":
        path.mkdir()
    elif name == "fifo":
        import os

        os.mkfifo(path)
    elif name == "latin-1":
        path.write_bytes("ä".encode("latin-1"))
    assert refuse(tiny, chat_file, f"stages.sft.chat_template={path}").startswith("stages.sft.chat_template: ")


def test_a_refusal_survives_the_way_back_from_a_forked_process() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(OverLimit("x: takes too long")))
    assert isinstance(error, OverLimit) and str(error) == "x: takes too long"
