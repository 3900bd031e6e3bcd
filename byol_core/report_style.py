"""How the report looks: light and dark, phone and desktop, screen and paper."""

STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1b1f24; --soft: #5d6875; --line: #dfe3e8;
  --good: #1a7f4b; --warn: #9a6700; --bad: #c0312b; --s0: #2563c9; --s1: #d9730d; --s2: #1a8f63; --s3: #b83280;
  --s4: #6b4fd8; --s5: #8a6d00; --s6: #0b8ca3; --s7: #6b7280 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --card: #1d2127; --ink: #e7eaee; --soft: #9aa5b1; --line: #343b44; --good: #4cc38a;
    --warn: #e2b340; --bad: #ff7b72; --s0: #6ea8fe; --s1: #f0a35e; --s2: #5fd0a1; --s3: #f08cc0; --s4: #b0a0ff;
    --s5: #d9c25a; --s6: #5fd0e0; --s7: #aab2bd }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: anywhere }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 3rem }
header { margin: .5rem 0 1rem }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2 }
.kind { margin: 0; color: var(--soft); font-size: .8rem; letter-spacing: .08em; text-transform: uppercase }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.1rem 1.25rem;
  margin: 0 0 1rem }
h2 { margin: 0 0 .6rem; font-size: 1.15rem }
p { margin: .4rem 0 }
.verdict { border-left: 5px solid var(--tone); padding: .1rem 0 .1rem 1rem }
.good { --tone: var(--good) }
.warn { --tone: var(--warn) }
.bad { --tone: var(--bad) }
.headline { color: var(--tone); font-size: 1.45rem; font-weight: 650; line-height: 1.25; margin: 0 }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.1rem, 1fr)); gap: .9rem;
  margin: 1.2rem 0 .2rem }
.facts div { margin: 0 }
dt { color: var(--soft); font-size: .8rem }
dd { margin: 0; font-weight: 600 }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .93rem; overflow-wrap: normal }
td, th { padding: .4rem .9rem .4rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
tbody tr:last-child td { border-bottom: 0 }
th { color: var(--soft); font-weight: 500; font-size: .85rem }
td { font-variant-numeric: tabular-nums }
.n { text-align: right; white-space: nowrap }
.w { overflow-wrap: anywhere }
.bar { display: block; height: .5rem; margin: .35rem 0 .1rem; min-width: 4rem; background: var(--line);
  border-radius: 4px }
.bar i { display: block; height: 100%; border-radius: 4px }
.baseline { background: var(--s7) }
.trained { background: var(--s0) }
td small { display: block; color: var(--soft); font-size: .8rem; line-height: 1.35 }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1.3rem }
figure { margin: 0 }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 .8rem; font-weight: 600 }
figcaption small { width: 100%; color: var(--soft); font-weight: 400; font-size: .8rem; margin-bottom: .3rem }
figcaption b { font-variant-numeric: tabular-nums }
svg { display: block; width: 100%; height: auto }
svg text { font-size: 11px; fill: var(--soft); font-family: inherit }
.x { text-anchor: middle }
.y { text-anchor: end }
svg .grid { stroke: var(--line) }
svg .tick { stroke: var(--soft) }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round }
polyline.raw { opacity: .35; stroke-width: 1 }
svg line.base { stroke: var(--s1); stroke-dasharray: 5 3 }
svg text.base { fill: var(--s1); text-anchor: end }
.mark.resume { stroke: var(--good); --mark: var(--good); stroke-dasharray: 2 3 }
.mark.skip { stroke: var(--bad); --mark: var(--bad); stroke-dasharray: 1 2 }
.s0 { stroke: var(--s0); --mark: var(--s0) }
.s1 { stroke: var(--s1); --mark: var(--s1) }
.s2 { stroke: var(--s2); --mark: var(--s2) }
.s3 { stroke: var(--s3); --mark: var(--s3) }
.s4 { stroke: var(--s4); --mark: var(--s4) }
.s5 { stroke: var(--s5); --mark: var(--s5) }
.s6 { stroke: var(--s6); --mark: var(--s6) }
.s7 { stroke: var(--s7); --mark: var(--s7) }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; color: var(--soft); font-size: .88rem }
.legend i { display: inline-block; width: 1.4rem; border-top: 3px solid var(--mark); vertical-align: middle;
  margin-right: .5rem }
.legend i.mark { border-top-style: dashed; border-top-width: 2px }
.pictures { columns: 30rem; column-gap: 2.5rem }
.pictures figure { break-inside: avoid; margin-bottom: 1.6rem }
img { display: block; max-width: 100%; height: auto; margin-top: .5rem; border-radius: 6px }
pre { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem;
  overflow-x: auto; font-size: .85rem; line-height: 1.45; white-space: pre-wrap }
summary { cursor: pointer; color: var(--soft) }
footer { color: var(--soft); font-size: .85rem }
@media (max-width: 34rem) {
  main { padding: 1rem .6rem 2rem }
  section { padding: .9rem .9rem }
  td, th { padding-right: .6rem }
}
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #ccc; --good: #1a7f4b; --warn: #9a6700;
    --bad: #c0312b; --s0: #2563c9; --s1: #b85c00; --s2: #1a8f63; --s3: #b83280; --s4: #6b4fd8; --s5: #8a6d00;
    --s6: #0b8ca3; --s7: #6b7280; color-scheme: light }
  body { font-size: 11pt; print-color-adjust: exact; -webkit-print-color-adjust: exact }
  section { border: 0; padding: 0 }
  figure, tr, .verdict { break-inside: avoid }
  h2 { break-after: avoid }
  .curves { grid-template-columns: repeat(3, 1fr) }
  .pictures { columns: auto }
  .pictures figure { display: inline-block; vertical-align: top; margin: 0 1rem 1rem 0 }
  img { max-height: 21cm; width: auto }
}
"""
