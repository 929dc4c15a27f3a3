"""The style sheet of the report: light and dark, desktop and phone, nothing loaded from outside."""

CSS = """
:root{--bg:#fbfbf9;--card:#fff;--ink:#1d2328;--soft:#58636c;--rule:#dfe3e6;--c0:#0b6e8f;--c1:#c9562c;--c2:#6b7780;
--c3:#4f7f2e;--c4:#7a4f9a;--c5:#a67c00;--c6:#b03a6e;--c7:#1d2328}
@media (prefers-color-scheme:dark){:root{--bg:#14181b;--card:#1c2226;--ink:#e4e8ea;--soft:#9aa6ae;--rule:#343d43;
--c0:#4fb6d6;--c1:#f0895f;--c2:#9aa6ae;--c3:#8fc46a;--c4:#b996d8;--c5:#e0bb4a;--c6:#ec86ad;--c7:#e4e8ea}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main{max-width:1160px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:1.7rem;margin:0 0 4px}
h2{font-size:1.35rem;margin:44px 0 8px;padding-top:14px;border-top:2px solid var(--rule)}
h2 small{font-weight:400;color:var(--soft);font-size:.9rem}
h3{font-size:1.05rem;margin:26px 0 6px}
.models span{display:inline-block;margin:0 8px 6px 0;padding:2px 12px;border:1px solid var(--rule);border-radius:99px;
background:var(--card)}
header p,figure p,.caption{color:var(--soft)}
header p{max-width:75ch}
ul{padding-left:1.2em;margin:6px 0}
li{margin:3px 0;max-width:95ch}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:18px;margin:20px 0;
align-items:start}
figure{margin:0;padding:14px 14px 8px;background:var(--card);border:1px solid var(--rule);border-radius:10px;min-width:0}
figcaption{font-weight:600;margin-bottom:6px}
figure p{font-size:.85rem;margin:6px 0}
svg{display:block;width:100%;height:auto}
.tick{font-size:12.5px;fill:var(--soft)}
.label{font-size:13px;fill:var(--ink)}
.grid line.grid{stroke:var(--rule);stroke-width:1}
.axis{stroke:var(--soft);stroke-width:1}
.mark{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3}
.line{fill:none;stroke-width:2}
.bar{stroke-width:1.6}
.dot{stroke:var(--card);stroke-width:1.2}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.85rem;margin:4px 0}
.key{display:inline-flex;align-items:center;gap:6px;overflow-wrap:anywhere}
.swatch{width:14px;height:10px;border-radius:2px;flex:none}
.line.hollow{stroke-dasharray:2 3}
.box.hollow{opacity:.5}
.swatch.hollow{background:none!important;border:2px solid}
.swatch.dashed{height:0;border-top:2px dashed;background:none!important}
.scroll{overflow-x:auto;margin:10px 0 6px;border:1px solid var(--rule);border-radius:10px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
.caption{margin:0 0 22px;font-size:.84rem;max-width:110ch}
th,td{padding:5px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
th{font-weight:600;background:var(--bg)}
th.text,td.text{text-align:left;position:sticky;left:0;background:var(--card)}
th.text{background:var(--bg)}
td.text{font-family:ui-monospace,SFMono-Regular,Menlo,monospace;font-size:.8rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 16px;font-size:.88rem}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
@media (max-width:620px){body{font-size:15px}header,main{padding-left:14px;padding-right:14px}
.tick,.label{font-size:14.5px}figure{padding:10px 8px 6px}dl{grid-template-columns:1fr}dt{margin-top:6px}
th,td{padding:5px 8px}td.text{font-size:.74rem;min-width:11em;max-width:46vw;white-space:normal;overflow-wrap:anywhere}}
""" + "".join(
    f".line.c{i},.bar.c{i}{{stroke:var(--c{i})}}.dot.c{i},.box.c{i}{{fill:var(--c{i})}}.dot.c{i}.hollow{{fill:var(--card);stroke:var(--c{i});stroke-width:2}}"
    f".swatch.c{i}{{background:var(--c{i});border-color:var(--c{i})}}\n"
    for i in range(8)
)
