"""How the report of a load test looks: light or dark as the reader's system is, colours that everybody tells apart."""

from __future__ import annotations

COLORS = (
    ("#0067b0", "#5cb6f2"),
    ("#007d5b", "#2fc99c"),
    ("#b36b00", "#f0ae2e"),
    ("#c23b12", "#ff8257"),
    ("#98468a", "#e39ad3"),
    ("#3b8ec2", "#a5d3f0"),
    ("#6a7380", "#9aa4b1"),
)
"""Light and dark: told apart by all common kinds of colour vision, and dark or light enough to be read as text."""
_PAGE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #5b6572; --line: #e3e7ec; --band: #f3f5f8;
  --card: #f7f8fa; --hover: rgba(20, 40, 80, .09); --good: #0b6b43; --bad: #b3261e; --warn: #8a5a00; LIGHT }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e7eaee; --soft: #98a2af; --line: #2b3139;
  --band: #1b2026; --card: #1b2026; --hover: rgba(200, 220, 255, .12); --good: #4fc28d; --bad: #ff7a6e; --warn: #e6b450;
  DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 24px 60px; max-width: 1080px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0; }
h2 { font-size: 19px; margin: 44px 0 8px; }
h3 { font-size: 15px; margin: 0; }
p { margin: 4px 0; }
.soft, figcaption { color: var(--soft); font-size: 13.5px; }
.verdict { border-left: 5px solid var(--good); background: var(--card); padding: 12px 16px; margin: 18px 0;
  border-radius: 4px; }
.verdict.bad { border-color: var(--bad); }
.verdict.warn { border-color: var(--warn); }
.verdict strong { color: var(--good); font-size: 16px; }
.bad strong, .no { color: var(--bad); }
.warn strong { color: var(--warn); }
.verdict ul { margin: 4px 0 0; padding-left: 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 10px; margin: 18px 0; }
.cards div { background: var(--card); border-radius: 6px; padding: 10px 14px; }
.cards span { display: block; color: var(--soft); font-size: 13px; }
.cards b { font-size: 21px; font-weight: 600; white-space: nowrap; }
.wide { overflow-x: auto; }
.wide svg { min-width: 620px; }
.halves .wide svg { min-width: 400px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; margin: 8px 0 16px; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--soft);
  padding: 4px 14px 4px 0; vertical-align: bottom; }
td { border-bottom: 1px solid var(--line); padding: 4px 14px 4px 0; vertical-align: top; max-width: 460px;
  overflow-wrap: break-word; }
td:first-child:not(.n) { min-width: 96px; max-width: 220px; }
th.n, td.n { text-align: right; white-space: nowrap; }
tr.all td { font-weight: 600; }
td.group { color: var(--soft); font-size: 13px; padding-top: 12px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 0 28px; margin: 8px 0 16px;
  font-size: 14px; }
dl div { display: flex; justify-content: space-between; gap: 16px; border-bottom: 1px solid var(--line);
  padding: 4px 0; }
dt { color: var(--soft); }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
figure { margin: 26px 0 0; break-inside: avoid; }
figcaption { margin-bottom: 8px; }
.halves { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 0 24px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; list-style: none; margin: 2px 0 0; padding: 0 0 0 74px;
  font-size: 13px; }
.legend i { display: inline-block; width: 20px; border-top: 3px solid var(--c); vertical-align: middle;
  margin-right: 6px; }
.legend i.dashed { border-top-style: dashed; border-top-width: 2px; }
@media (max-width: 560px) { .halves { grid-template-columns: 1fr; } }
"""
_PLOT = """
svg.plot { display: block; width: 100%; height: auto; font: 11.5px system-ui, sans-serif; overflow: visible; }
.plot text { fill: var(--soft); }
.plot .axis { fill: var(--ink); }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.plot .base { stroke: var(--soft); stroke-width: 1; }
.plot .band { fill: var(--band); }
.plot .event { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 3 3; }
.plot .span { fill: var(--ink); opacity: .08; }
.plot .failed { stroke: var(--bad); }
.plot text.failed { fill: var(--bad); stroke: none; }
.plot text.name { fill: var(--ink); }
.plot .line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.plot .thin { stroke-width: 1; }
.plot .dashed { stroke-dasharray: 5 3; }
.plot .dot { fill: var(--c); }
.plot .area { fill: var(--c); }
.plot text.tag { fill: var(--c); font-weight: 600; }
.plot .hit { fill: transparent; }
.plot .hit:hover { fill: var(--hover); }
"""


def page() -> str:
    """The style sheet."""
    light, dark = ("".join(f"--c{n}: {pair[k]}; " for n, pair in enumerate(COLORS)) for k in (0, 1))
    classes = "\n".join(f".c{n} {{ --c: var(--c{n}); }}" for n in range(len(COLORS)))
    return _PAGE.replace("LIGHT", light).replace("DARK", dark) + _PLOT + classes
