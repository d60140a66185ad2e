"""The frame of every page: one HTML file, its style inside, nothing fetched, no script."""

from tl_jax.report.markup import escape

STYLE = """
:root{--paper:#fff;--ink:#1f2328;--quiet:#59636e;--line:#d9dee4;--soft:#f6f8fa;--hit:#2f7fc9;--miss:#e76300;
--warn:#fff8e6;--warnline:#d4a72c;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--paper:#0f1318;--ink:#e3e8ee;--quiet:#98a3af;--line:#2d343d;--soft:#181e25;
--hit:#4a97dd;--miss:#f08030;--warn:#2b2410;--warnline:#8a6d1c}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:2.5rem 1.5rem 4rem;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .25rem;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.75rem 0 .75rem;padding-bottom:.35rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.75rem 0 .5rem;overflow-wrap:anywhere}
p{margin:.4rem 0}
.lead,.caption,footer{color:var(--quiet)}
.caption{font-size:.87rem;max-width:48rem}
a{color:var(--hit)}
code,pre{font:12.5px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
pre{background:var(--soft);border:1px solid var(--line);border-radius:6px;padding:.75rem 1rem;margin:.5rem 0;
overflow:auto;max-height:34rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1.25rem;margin:1rem 0;font-size:.92rem}
dt{color:var(--quiet)}
dd{margin:0;overflow-wrap:anywhere}
.notes{background:var(--warn);border-left:4px solid var(--warnline);margin:1rem 0;padding:.6rem 1rem .6rem 2rem;
border-radius:0 6px 6px 0;overflow-wrap:anywhere}
.cards{display:flex;flex-wrap:wrap;gap:.7rem;margin:1.25rem 0}
.card{background:var(--soft);border:1px solid var(--line);border-radius:8px;padding:.65rem .8rem;flex:1 1 118px}
.card span{display:block}
.label,.remark{font-size:.8rem;color:var(--quiet)}
.value{font-size:1.3rem;white-space:nowrap;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.scroll{overflow:auto;max-height:36rem;margin:.75rem 0}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums;width:100%}
th{position:sticky;top:0;background:var(--paper);text-align:left;font-weight:600;font-size:.82rem;color:var(--quiet);
box-shadow:inset 0 -1px var(--line);vertical-align:bottom}
th,td{padding:.36rem .9rem .36rem 0}
td{border-bottom:1px solid var(--line);max-width:22rem;overflow-wrap:anywhere}
td.n{white-space:nowrap}
.n{text-align:right;padding-left:.9rem;padding-right:0}
tr.best td{font-weight:600}
.track{display:inline-block;width:4.5rem;text-align:left;background:var(--soft);border-radius:2px}
.track span{display:block;height:.5rem;border-radius:2px;background:var(--hit)}
.columns{display:flex;flex-wrap:wrap;gap:1rem 2.5rem;align-items:flex-start}
.columns>*{flex:1 1 320px;min-width:0}
svg{display:block;width:100%;height:auto}
svg.plot text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif!important}
.wide{overflow-x:auto}
.wide .plot{min-width:620px}
.confusion text{fill:currentColor;text-anchor:middle;dominant-baseline:central}
.confusion text.on{fill:#fff}
.confusion text.row{text-anchor:end}
.confusion text.up{text-anchor:start}
.confusion .hit{fill:var(--hit)}
.confusion .miss{fill:var(--miss)}
.confusion .grid{fill:var(--soft);stroke:var(--line)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;margin:.5rem 0;padding:0;font-size:.87rem}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(92px,1fr));gap:1rem .8rem;margin:1rem 0}
.photos{grid-template-columns:repeat(auto-fill,minmax(148px,1fr))}
figure{margin:0;font-size:.82rem;line-height:1.35;overflow-wrap:anywhere}
figure img{width:100%;aspect-ratio:1;object-fit:contain;background:var(--soft);border:1px solid var(--line);
border-radius:4px;display:block;margin-bottom:.3rem}
.pixels{image-rendering:pixelated}
figcaption .miss{color:var(--miss);font-weight:600}
figcaption .quiet{color:var(--quiet)}
details{margin:.75rem 0}
summary{cursor:pointer;font-weight:600}
footer{margin-top:3rem;border-top:1px solid var(--line);padding-top:.75rem;font-size:.85rem}
@media print{body{max-width:none;padding:0}.scroll,pre{max-height:none}section{break-inside:avoid}}
"""


def document(title: str, body: str, footer: str) -> str:
    """A complete page. `body` is HTML already; `title` and `footer` are text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f'<title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f'<body>{body}<footer>{escape(footer)}</footer></body></html>\n'
    )
