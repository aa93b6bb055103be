"""What is known of a template from its source: that it only appends, and where its prompt begins."""

import pytest

from nemo_ray.data.template import PROMPT, chat_template
from tests.data.helpers import MARKED as CHATML
from tests.data.helpers import PLAIN
from tests.data.nemotron import MARKED, UNMARKED


@pytest.mark.parametrize(
    ("template", "appends"),
    [
        (CHATML, True),
        (PLAIN, True),
        (MARKED, False),
        (UNMARKED, False),
        (
            "{{ messages[0].content }}{% for m in messages[1:] %}{{ loop.index }}{{ m.content }}{% endfor %}",
            True,
        ),
        ("{% for m in messages %}{% for c in m.calls %}{{ loop.last }}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{{ loop.last }}{% endfor %}", False),
        ("{% for m in messages %}{{ loop.nextitem.role }}{% endfor %}", False),
        ("{% for m in messages %}{% for c in m.calls if loop.last %}x{% endfor %}{% endfor %}", False),
        ("{% for m in messages %}{% set x = loop %}{{ x.last }}{% endfor %}", False),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{{ messages[-1].role }}{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{{ messages[1].role }}{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages[::-1] %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages[:-1] %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}", False),
        ("{% for m in messages %}{{ m.content }}{% else %}none{% endfor %}", False),
        ("{% set all = messages %}{% for m in messages %}{{ all | length }}{% endfor %}", False),
        ("{% filter upper %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfilter %}", False),
    ],
)
def test_a_template_is_known_to_append_only_where_it_shows(template: str, appends: bool) -> None:
    assert chat_template(template, {}).appends == appends


@pytest.mark.parametrize(
    ("end", "prompts"),
    [
        ("{% if add_generation_prompt %}go{% endif %}", True),
        ("{% if add_generation_prompt %}{{ messages | length }}{% endif %}", True),
        ("{%- if add_generation_prompt -%}go{%- endif -%}\n", True),
        ("", False),
        ("{% if add_generation_prompt %}go{% endif %}.", False),
        ("{% if add_generation_prompt %}go{% else %}end{% endif %}", False),
        ("{% if add_generation_prompt and tools %}go{% endif %}", False),
        ("{% if not add_generation_prompt %}end{% endif %}", False),
        ("{{ add_generation_prompt }}{% if add_generation_prompt %}go{% endif %}", False),
        ("{% set add_generation_prompt = true %}{% if add_generation_prompt %}go{% endif %}", False),
    ],
)
def test_where_a_prompt_begins_is_known_only_where_it_shows(end: str, prompts: bool) -> None:
    template = chat_template("{% for m in messages %}{{ m.content }}{% endfor %}" + end, {})
    assert template.prompts == prompts
    text = template.render([{"role": "user", "content": "a"}], prompt=True)
    assert text.count(PROMPT) == prompts
    if prompts:
        assert text.split(PROMPT)[0] == template.render([{"role": "user", "content": "a"}])
