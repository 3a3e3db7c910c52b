"""Texts that try to act on a terminal or a page, and what they must not leave behind."""

from __future__ import annotations

ESC, BEL, ST, CSI8, OSC8 = "\x1b", "\x07", "\x1b\\", "\x9b", "\x9d"

CONTROLS = [f"a{chr(code)}b" for code in (*range(0x20), 0x7F, *range(0x80, 0xA0))]

TERMINAL = [
    f"{ESC}]52;c;aGVsbG8={BEL}",
    f"{ESC}]52;c;aGVsbG8={ST}",
    f"{ESC}]52;c;?{BEL}",
    f"{OSC8}52;c;aGVsbG8=\x9c",
    f"{ESC}]0;title{BEL}",
    f"{ESC}]2;title{ST}",
    f"{ESC}]8;;https://example.org{ST}click{ESC}]8;;{ST}",
    f"{ESC}]8;;file:///etc/passwd{BEL}click{ESC}]8;;{BEL}",
    f"{ESC}]1337;File=inline=1:AAAA{BEL}",
    f"{ESC}]7;file://host/{BEL}",
    f"{ESC}]unterminated",
    f'{ESC}P$q"p{ST}',
    f"{ESC}Pq#0;2;0;0;0{ST}",
    f"{ESC}_Gf=100;AAAA{ST}",
    f"{ESC}^private{ST}",
    f"{ESC}Xstring{ST}",
    f"{ESC}[2J{ESC}[H",
    f"{ESC}[6n",
    f"{ESC}[c",
    f"{ESC}[>c",
    f"{ESC}[21t",
    f"{ESC}[1A{ESC}[2K",
    f"{ESC}[?1049h",
    f"{ESC}[?25l",
    f"{ESC}[?2004h",
    f"{ESC}[31mred",
    f"{ESC}[8mhidden{ESC}[0m",
    f"{ESC}[38;2;0;0;0mblack",
    f"{ESC}[",
    f"{ESC}[999999999999999C",
    f"{CSI8}2J",
    f"{CSI8}6n",
    f"{ESC}c",
    f"{ESC}#8",
    f"{ESC}(0lqqk",
    f"{ESC}N{ESC}O",
    "\rerror: overwritten",
    "a\b\b\b\bgone",
    "line\x0bvertical\x0cform",
    "\x0e\x0f shifted",
    f"{ESC}[200~pasted{ESC}[201~",
    "first\nsecond\r\nthird\u2028fourth\u2029fifth\x85sixth",
]

INVISIBLE = [
    *(
        f"abc{mark}def"
        for mark in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"
    ),
    *(
        f"ab{mark}cd"
        for mark in "\u200b\u200c\u200d\u2060\u2061\u2064\ufeff\u00ad\u034f\u180e\u3164\uffa0"
    ),
    "tag\U000e0041\U000e0042",
    "variant\ufe0f\U000e0100",
    "lone \ud800 surrogate \udfff",
    "noncharacter \ufffe \U0001ffff",
    "private \ue000 \U000f0000",
    "z" + "\u0334\u0335\u0336" * 200,
    "\u0300" * 50,
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "wide 漢字 and a\u3000space",
    "x" * 1_000_000,
    "\u0000\u0001",
]

MARKUP = [
    "[bold",
    "[/bold]",
    "[/]",
    "[[[",
    "[link=https://example.org]click[/link]",
    "[red]text[/green]",
    "[on red blink]x",
    "\\[bold]",
    ":smile: :warning:",
    "[@click=app.bell]x[/]",
    "[not a tag",
    "https://example.org/?a=1&b=2",
    "{{ 7 * 7 }} {% raw %} {# x #}",
    "${7*7} #{7} %(name)s {0} %s",
]

HTML = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "</svg><script>alert(1)</script>",
    "</title><h1>x",
    "</style><style>*{display:none}",
    '"><b onmouseover=alert(1)>',
    "' onclick='alert(1)",
    '<a href="javascript:alert(1)">x</a>',
    "javascript:alert(1)",
    "<iframe src=//example.org>",
    "<meta http-equiv=refresh content=0;url=//example.org>",
    "<base href=//example.org>",
    "<!-- <!--",
    "-->",
    "]]>",
    "<![CDATA[x]]>",
    "&lt;script&gt;",
    "&#60;script&#62;",
    "<math><mtext></form><form>",
    "<table><td>",
    "<plaintext>",
    "<textarea><noscript><xmp>",
    "<details open ontoggle=alert(1)>",
    "@import url(//example.org)",
    "background:url(//example.org)",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "@SUM(1)",
    "-1",
    "[x](javascript:alert(1))",
    "![x](//example.org/p.png)",
]

HOSTILE = [*CONTROLS, *TERMINAL, *INVISIBLE, *MARKUP, *HTML]
assert len(HOSTILE) >= 100
