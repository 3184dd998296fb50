import json
import logging

import pytest
from transformers import AutoTokenizer

from trtserve.server.errors import InvalidRequest
from trtserve.server.model.errors import ModelError
from trtserve.server.model.folder import ModelFolder
from trtserve.server.text.chat_template import ChatTemplate, load_chat_template
from trtserve.server.text.template_engines import compile_jinja2, compile_minijinja

USER = {"role": "user", "content": "Hi"}
CHAT = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Yo "}]

# What templates in the wild do: namespaces, loop controls, Python methods, macros, filters, slices, whitespace control.
BUSY = """
{%- set ns = namespace(last=-1) %}
{%- macro show(text, tag='x') %}<{{ tag }}>{{ text | trim }}</{{ tag }}>{% endmacro %}
{{- bos_token }}
{%- if tools %}
    {{- '# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\\n' ~ (tool | tojson(indent=2)) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}
        {%- set ns.last = messages | length - loop.index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- if message.role not in ['user', 'system', 'assistant', 'tool'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {%- if message['content'] is string and '</think>' in message.content %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- else %}
        {%- set content = message.content or '' %}
    {%- endif %}
    {% generation %}
    {{- show(content, message.role) }}
    {%- endgeneration -%}
    {%- for call in message.tool_calls or [] %}
        {%- for key, value in call.function.arguments.items() %}
            {{- key }}={{ value if value is string else value | tojson }};
        {%- endfor %}
    {%- endfor %}
    {{- loop.index0 }}{{ loop.last }}{{ none }}{{ 1.0 }}
{%- endfor %}
{{- date_string or strftime_now('%Y') }}
{%- if add_generation_prompt %}
    {{- '<assistant>' }}
{%- endif %}
"""


@pytest.fixture(scope="module")
def template(default_folder):
    return load_chat_template(default_folder)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", [[USER], CHAT])
def test_the_default_model_renders_as_transformers_does(template, default_model, messages, add_generation_prompt):
    reference = AutoTokenizer.from_pretrained(default_model)
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert template.render(messages, add_generation_prompt) == expected


def test_a_busy_template_renders_alike_in_both_engines():
    variables = {
        "bos_token": "<s>",
        "messages": [*CHAT, {"role": "skip"}, {"role": "assistant", "content": "<think>\n</think>\n <é> & \"'"}],
        "tools": [{"name": "é<>", "parameters": {"a": [1, 2.5, True, None]}}],
        "add_generation_prompt": True,
    }
    variables["messages"].append(
        {"role": "assistant", "tool_calls": [{"function": {"arguments": {"city": "Zürich", "exact": True}}}]}
    )
    expected = compile_jinja2(BUSY)(**variables)
    assert '{"name": "é<>", "parameters": {"a": [1, 2.5, true, null]}}' in expected
    assert "city=Zürich;exact=true;" in expected
    assert compile_minijinja(BUSY)(**variables) == expected


def test_messages_that_the_template_refuses_are_a_400():
    template = ChatTemplate({"default": BUSY}, {})
    with pytest.raises(InvalidRequest, match="refuses these messages: unknown role <b>") as caught:
        template.render([{"role": "<b>", "content": "x"}])
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize("source", ["{{ messages[0].content.nothing.at_all }}", "{{ messages[0].content + 1 }}"])
def test_messages_that_the_template_stumbles_over_are_a_400(source):
    with pytest.raises(InvalidRequest, match="cannot render these messages"):
        ChatTemplate({"default": source}, {}).render([USER])


@pytest.fixture
def chosen(caplog):
    """Make a template and say which engine renders it, by what the log has."""
    caplog.set_level(logging.INFO, logger="trtserve.server.text.chat_template")

    def choose(source):
        caplog.clear()
        template = ChatTemplate({"default": source}, {})
        return template, caplog.text

    return choose


def test_minijinja_renders_what_it_renders_alike(chosen):
    assert chosen(BUSY)[1] == ""


def test_what_minijinja_cannot_compile_jinja2_renders(chosen):
    template, log = chosen("{% print messages[0].role %}")
    assert "minijinja cannot compile it" in log
    assert template.render([USER]) == "user"


def test_what_minijinja_renders_otherwise_is_left_to_jinja2(chosen):
    template, log = chosen("{% for m in messages %}{{ '%s: %s' % (m.role, m.content) }}{% endfor %}")
    assert "minijinja renders a probe otherwise" in log
    assert template.render([USER]) == "user: Hi"


def test_continuing_the_last_message_ends_right_behind_it(template):
    prompt = template.render(CHAT, add_generation_prompt=False, continue_final_message=True)
    assert prompt.endswith("<|im_start|>assistant\nYo ")
    assert CHAT[-1]["content"] == "Yo "


def test_continuing_is_refused_where_it_means_nothing(template):
    with pytest.raises(InvalidRequest, match="send only one of them"):
        template.render(CHAT, add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(InvalidRequest, match="needs a last message with text"):
        template.render([], add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(InvalidRequest, match="drops the last message"):
        ChatTemplate({"default": "fixed"}, {}).render(CHAT, False, True)


def test_a_template_for_tools_is_used_with_tools():
    template = ChatTemplate({"default": "plain", "tool_use": "{{ tools | length }} tools {{ style }}"}, {})
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=[{}], style="x") == "1 tools x"


def test_a_model_without_a_template_takes_no_messages(tmp_path):
    template = load_chat_template(ModelFolder(tmp_path, "bare"))
    assert not template.is_there
    with pytest.raises(InvalidRequest, match="has no chat template"):
        template.render([USER])


def test_where_templates_are_looked_for(tmp_path):
    folder = ModelFolder(tmp_path, "some")
    config = {
        "eos_token": {"content": "</s>"},
        "chat_template": [{"name": "default", "template": "list{{ eos_token }}"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat_template(folder).render([USER]) == "list</s>"
    (tmp_path / "chat_template.jinja").write_text("file{{ eos_token }}{{ bos_token }}")
    assert load_chat_template(folder).render([USER]) == "file</s>"


def test_a_broken_template_is_said_at_load(tmp_path):
    with pytest.raises(ModelError, match="'default' is no Jinja template"):
        ChatTemplate({"default": "{% if %}"}, {})
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [1]}')
    with pytest.raises(ModelError, match="neither a text nor a list"):
        load_chat_template(ModelFolder(tmp_path, "broken"))
