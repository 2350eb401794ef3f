"""Writes src/text/goldens/templates/*.json: chat templates of the shapes in use, and how Jinja with
transformers' settings renders conversations with them.

Run: python tools/goldens/chat_templates.py      (needs: pip install transformers jinja2)
"""

import json
import pathlib

from transformers.utils.chat_template_utils import _compile_jinja_template

OUT = pathlib.Path(__file__).parents[2] / "src/text/goldens/templates"

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Weather <now> & "here", é',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "enum": [1, 2]}},
            "required": [],
        },
    },
}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Köln", "days": [1, 2.5, True, None]}},
}
USER, SYSTEM = {"role": "user", "content": "Hi <b> & 'q' \"d\"\n"}, {
    "role": "system",
    "content": " Be brief. ",
}
ANSWER, CALLING = {"role": "assistant", "content": "Hello"}, {
    "role": "assistant",
    "content": "",
    "tool_calls": [CALL],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": '{"sun": true}'}

CONVERSATIONS = [
    {"messages": [USER], "tools": None, "prompt": True},
    {"messages": [USER], "tools": None, "prompt": False},
    {"messages": [SYSTEM, USER, ANSWER, USER], "tools": None, "prompt": True},
    {"messages": [SYSTEM, USER], "tools": [TOOL], "prompt": True},
    {"messages": [USER, CALLING, RESULT, USER], "tools": [TOOL], "prompt": True},
    {"messages": [ANSWER, USER], "tools": None, "prompt": True},
]

TEMPLATES = {
    # A system prompt of its own where none is given.
    "default-system": """{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|start|>system\\nHelp.<|end|>\\n' }}
{% endif %}
{{'<|start|>' + message['role'] + '\\n' + message['content'] + '<|end|>' + '\\n'}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}""",
    # Alternating roles enforced; tokens by name; trimmed content.
    "alternating": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
    {%- set rest = messages[1:] %}
    {%- set system = messages[0]['content'] | trim + '\\n\\n' %}
{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}
{% for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
[INST] {{ system if loop.first else '' }}{{ message['content'] | trim }} [/INST]
    {%- else %}
 {{ message['content'] }}{{ eos_token }}
    {%- endif %}
{% endfor %}""",
    # Tools as JSON, calls as JSON, results in a user turn.
    "tools": """{%- if tools %}<|start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools
{%- for tool in tools %}

{{ tool | tojson }}
{{ tool.function.parameters | tojson(indent=2) }}
{%- endfor %}<|end|>
{% endif %}
{%- for m in messages if m.role != 'system' or not tools %}
<|start|>{{ m.role }}
{% if m.content is string and m.content %}{{ m.content }}{% endif %}
{%- if m.tool_calls is defined %}
{%- for call in m.tool_calls %}
<call>{"name": "{{ call.function.name }}",
"arguments": {{ call.function.arguments | tojson }}}</call>
{%- endfor %}
{%- endif %}<|end|>
{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}""",
    # Macros, namespaces, filters on missing values, loop controls.
    "macros": """{%- macro show(kind, value=none) -%}({{ kind }}
{{- value if value is not none else '' }}){%- endmacro -%}
{%- set ns = namespace(users=0, last='') -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}{%- continue -%}{%- endif -%}
{%- if m.role == 'user' -%}{%- set ns.users = ns.users + 1 -%}{%- endif -%}
{%- set ns.last = m.role -%}
{{ show(m.role | upper, ns.users) }}{{ m.nothing | trim }}{{ m.nothing | default('-') }}
{%- endfor -%}
{{ ns.last }} {{ messages | map(attribute='role') | join(',') }}
{{ (messages | selectattr('role', 'equalto', 'user') | list) | length }}
{%- if tools is not none and tools is defined %} {{ tools | length }}{% endif %}
{{ range(3) | list | tojson }} {{ '%s' in 'a%sb' }} {{ messages[-1].role[:2] ~ 1 }}
{{ true }} {{ 1.5 }} {{ [1, 'a', "it's", none, {'k': false}] }}
{{ {'a': ['x\n']} | string }} {{ false | string }}
{{- messages[0].nothing | upper }}{{ none | selectattr('x') | list }}""",
}


def main() -> None:
    OUT.mkdir(exist_ok=True, parents=True)
    for name, source in TEMPLATES.items():
        template = _compile_jinja_template(source)
        rendered = []
        for one in CONVERSATIONS:
            try:
                text = template.render(
                    messages=one["messages"],
                    tools=one["tools"],
                    documents=None,
                    add_generation_prompt=one["prompt"],
                    bos_token="<s>",
                    eos_token="</s>",
                )
                rendered.append({"text": text})
            except Exception as error:  # a refusal is a result as well
                rendered.append({"error": str(error)})
        golden = {"source": source, "conversations": CONVERSATIONS, "rendered": rendered}
        (OUT / f"{name}.json").write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
