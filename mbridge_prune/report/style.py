"""The page's one style sheet: two themes, one column, text that keeps its size on a phone."""

CSS = """
:root{color-scheme:light dark;
--bg:#fdfdfc;--card:#fff;--ink:#1b1e24;--soft:#5a616d;--rule:#e2e4e8;--grid:#eceef1;
--kept:#2a6bb0;--kept-soft:#a9c8e8;--cut:#c75b12;--cut-soft:#f3c9a6;--win:#0b7a56;--cloud:#8d95a3;--dot:9px;
--sans:-apple-system,BlinkMacSystemFont,"Segoe UI",Inter,Roboto,"Helvetica Neue",Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
@media(prefers-color-scheme:dark){:root{
--bg:#15171b;--card:#1a1d22;--ink:#e8eaee;--soft:#a2a9b5;--rule:#2e333b;--grid:#262a31;
--kept:#69a9ec;--kept-soft:#315579;--cut:#f09a52;--cut-soft:#6d4526;--win:#4cc795;--cloud:#737c8b}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 var(--sans);
font-variant-numeric:tabular-nums;overflow-wrap:break-word}
main,header,footer,nav{max-width:1080px;margin:0 auto;padding:0 28px}
header{padding-top:56px}
.over{color:var(--soft);font-size:.86rem;margin:0 0 10px}
h1{font-size:clamp(1.65rem,1.1rem + 2.6vw,2.6rem);line-height:1.14;letter-spacing:-.022em;font-weight:680;
margin:0;max-width:22em;text-wrap:balance}
.lead{font-size:1.06rem;color:var(--soft);margin:14px 0 0;max-width:46em}
h2{font-size:1.4rem;letter-spacing:-.014em;font-weight:660;line-height:1.25;margin:0 0 6px}
section{border-top:1px solid var(--rule);padding:38px 0 10px;margin-top:34px}
section>p{max-width:46em;color:var(--soft);margin:0 0 18px}
h3{font-size:1.02rem;font-weight:640;margin:0;line-height:1.4}
h3 code{font-weight:400;color:var(--soft);margin-left:.3em}
.sizes{font-weight:400;color:var(--soft);margin-left:.3em;white-space:nowrap}
code{font:0.87em/1.4 var(--mono)}
a{color:var(--kept);text-underline-offset:.15em}
nav{margin-top:26px}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;margin:0;padding:0;font-size:.92rem}
nav a{text-decoration:none}nav a:hover{text-decoration:underline}
dl.facts{display:flex;flex-wrap:wrap;gap:1px;max-width:calc(var(--n)*190px);margin:30px 0 0;
background:var(--rule);border:1px solid var(--rule);border-radius:10px;overflow:hidden}
dl.facts>div{background:var(--card);padding:14px 20px 13px 16px;flex:1 1 168px}
dl.facts dt{color:var(--soft);font-size:.84rem}
dl.facts dd{margin:0}
dl.facts dd.big{font-size:1.62rem;font-weight:640;letter-spacing:-.02em;line-height:1.25}
dl.facts dd.from{color:var(--soft);font-size:.84rem}
.warn{border-left:3px solid var(--cut);padding:2px 0 2px 14px;margin:26px 0 0}
.warn p{margin:4px 0;font-size:.94rem}
.note{color:var(--soft);font-size:.92rem;max-width:52em}
figure{margin:30px 0 34px;min-width:0}
figcaption p{color:var(--soft);font-size:.92rem;margin:3px 0 0;max-width:52em}
.pair{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:0 44px}
.pair>figure,.pair>div>figure{margin:14px 0 20px}.pair{margin:26px 0}figure .pair,.pair .pair{margin:0}
.many{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,290px),1fr));gap:0 32px}
.many figure{margin:14px 0 18px}
.pair .many{grid-template-columns:repeat(auto-fill,minmax(min(100%,190px),1fr))}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:3px 20px;margin:12px 0 0;padding:0;font-size:.84rem;
color:var(--soft)}
.legend li{display:flex;align-items:center;gap:7px}
.key{flex:none;display:inline-block;width:12px;height:12px;border-radius:2px}
.key.kept{background:var(--kept)}.key.cut{background:var(--cut)}
.key.small{width:6px;height:6px;margin:0 3px;border-radius:0}
.key.median{height:2px;background:var(--ink)}.key.border{height:0;border-top:2px dashed var(--ink)}
.key.ramp{width:62px;
background:linear-gradient(90deg,color-mix(in srgb,var(--kept) 22%,var(--bg)),var(--kept))}
.key.gone,.gone{background:repeating-linear-gradient(135deg,var(--soft) 0 1px,transparent 1px 5px)}
.key.gone{border:1px solid var(--soft)}
.key.dot,.key.ring,.key.square{border-radius:50%;width:10px;height:10px}
.key.dot.cloud{background:var(--cloud);width:6px;height:6px;margin:0 2px}.key.dot.kept{background:var(--kept)}
.key.ring{border:2px solid var(--ink)}.key.square{border-radius:0;background:var(--cut);width:8px;height:8px}
.key.front{height:0;border-top:2px solid var(--ink);width:18px}
.key.bound{height:12px;width:0;border-left:2px dashed var(--cut);border-radius:0}
.key.diagonal{height:0;border-top:1px dashed var(--soft);width:18px}
.plot{font-size:.75rem;color:var(--soft);margin-top:14px;line-height:1.2}
.plot.banded .area{max-width:calc(var(--cols)*46px)}
.area{position:relative;height:var(--h);margin:0 10px 24px var(--y)}
.area svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible;display:block}
.area path{vector-effect:non-scaling-stroke;fill:none}
.area span{position:absolute;white-space:nowrap}
.area>i{position:absolute;display:block}
.yt{right:100%;margin-right:7px;transform:translateY(-50%)}
.xt{top:100%;margin-top:7px;transform:translateX(-50%)}
.ytitle{display:block;margin-bottom:9px}
.xtitle{display:block;text-align:right;margin:-1px 10px 0 0}
.plot.banded .xtitle{max-width:calc(var(--cols)*46px + var(--y));box-sizing:border-box}
.area>i.hover,.area>i.gone{top:0;bottom:0}
.area>i.gone{opacity:.42}
.area>i.hover:hover{background:color-mix(in srgb,var(--ink) 7%,transparent)}
.area .grid{stroke:var(--grid);stroke-width:1}
.area .kept{fill:var(--kept)}.area .cut{fill:var(--cut)}
.area .wide{opacity:.42}
.area .area-fill{opacity:.28}
.area .line{stroke-width:2;stroke:var(--ink)}
.area .kept-edge{stroke:var(--kept)}.area .cut-edge{stroke:var(--cut)}
.area .median{stroke:var(--bg);stroke-width:2}.key.median{outline:1px solid var(--soft);background:var(--bg)}
.area .border{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:4 2.5}
.area .group{stroke:var(--bg);stroke-width:5}
.area .s0{opacity:.24}.area .s1{opacity:.42}.area .s2{opacity:.6}.area .s3{opacity:.8}.area .s4{opacity:1}
.area .cut[class*=" s"]{opacity:.9}
.area .dot{stroke-linecap:round;stroke-width:var(--dot)}
.area .stem{stroke-width:1.5;opacity:.55}
.area .kept-dot{stroke:var(--kept)}.area .cut-dot{stroke:var(--cut);
stroke-linecap:square;stroke-width:calc(var(--dot)*.85)}
.area .cloud{stroke:var(--cloud);stroke-width:calc(var(--dot)*.4);opacity:.6}
.area .front{stroke:var(--ink);stroke-width:1.75}
.area .whisker{stroke:var(--kept);stroke-width:1.25;opacity:.7}
.area .b-dot{stroke:var(--cut);stroke-linecap:square;stroke-width:calc(var(--dot)*.8)}
.area .bound{stroke:var(--cut);stroke-width:1.75;stroke-dasharray:5 3}
.area .diagonal{stroke:var(--soft);stroke-width:1;stroke-dasharray:4 3}
.area .check{stroke:var(--cut);stroke-linecap:square;stroke-width:6}
.area>i.mark{transform:translate(-50%,-50%);pointer-events:none}
.area>i.ring{width:15px;height:15px;border:1.75px solid var(--ink);border-radius:50%}
.area>i.diamond,.key.diamond{background:var(--win);transform:translate(-50%,-50%) rotate(45deg);
width:13px;height:13px;
box-shadow:0 0 0 2px var(--bg),0 0 0 3.5px var(--win);border-radius:1px;pointer-events:auto}
.key.diamond{transform:rotate(45deg);width:9px;height:9px;box-shadow:none}
.at{transform:translate(-50%,-185%)}.at.down{transform:translate(-50%,85%)}
.at.strong{color:var(--win);font-weight:660;font-size:.84rem;
text-shadow:0 0 2px var(--bg),0 0 2px var(--bg),0 0 3px var(--bg),0 0 3px var(--bg),0 0 5px var(--bg)}
h4{font-size:.9rem;margin:16px 0 -4px;font-weight:400}
.funnel{list-style:none;display:grid;grid-template-columns:repeat(auto-fit,minmax(112px,1fr));gap:18px 10px;
margin:22px 0 0;padding:0}
.funnel li{border-top:2px solid var(--kept-soft);padding-top:8px}
.funnel li:last-child{border-color:var(--win)}
.funnel b{display:block;font-size:1.22rem;font-weight:640;letter-spacing:-.01em;line-height:1.3}
.funnel span{color:var(--soft);font-size:.84rem;line-height:1.35;display:block}
.settings{columns:2 400px;column-gap:52px}.settings>div{break-inside:avoid;margin:0 0 14px}
.settings table{width:100%;font-size:.86rem}.settings th,.settings td{padding-top:5px;padding-bottom:5px}
.settings thead th{font-weight:640;color:var(--ink);font-size:.92rem;padding-top:14px}
.settings td{white-space:normal;overflow-wrap:anywhere;width:55%}
table.wrap td:last-child{white-space:normal;min-width:16em}
.scroll{overflow-x:auto;margin:14px 0 4px;-webkit-overflow-scrolling:touch}
.scroll:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid var(--kept);outline-offset:2px}
table{border-collapse:collapse;font-size:.92rem;min-width:min(100%,30em)}
caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
th,td{text-align:left;padding:7px 22px 7px 0;border-bottom:1px solid var(--rule);font-weight:400;
vertical-align:baseline;line-height:1.4}
thead th{color:var(--soft);font-size:.84rem;vertical-align:bottom}
th.n,td.n{text-align:right}td.n{white-space:nowrap}
th:last-child,td:last-child{padding-right:2px}
tr.same>*{color:var(--soft)}td b,th b{font-weight:640}b.win{color:var(--win)}
td .bar{display:inline-block;width:120px;height:8px;border-radius:2px;background:var(--cut-soft);
vertical-align:middle;overflow:hidden}
td .bar.time{background:var(--grid)}td .bar>i{display:block;height:100%;background:var(--kept)}
details{margin:10px 0 0;font-size:.92rem}
summary{cursor:pointer;color:var(--soft);font-size:.86rem;width:fit-content;padding:3px 0}
summary:hover{color:var(--ink)}
details table{font-size:.86rem}details th,details td{padding-top:4px;padding-bottom:4px}
footer{color:var(--soft);font-size:.86rem;padding:30px 28px 64px;margin-top:30px}
footer p{border-top:1px solid var(--rule);padding-top:16px;margin:0}
@media(max-width:640px){main,header,footer,nav{padding-left:18px;padding-right:18px}header{padding-top:30px}
section{padding-top:28px;margin-top:26px}
dl.facts{max-width:none}dl.facts>div{flex-basis:136px}
dl.facts dd.big{font-size:1.35rem}dl.facts>div{padding:11px 13px}th,td{padding-right:14px}
td .bar{width:48px}:root{--dot:7px}
.legend{gap:3px 14px}}
@media(max-width:480px){table{font-size:.84rem}th,td{padding-right:10px}
td .bar:not(.time){display:none}td .bar.time{width:30px}}
@media print{details{display:none}section{break-inside:avoid-page}}
"""
