'use strict';
{
  const root = document.documentElement;
  const remembered = {
    get: (key) => { try { return localStorage.getItem(key); } catch { return null; } },
    set: (key, value) => { try { localStorage.setItem(key, value); } catch { /* a page opened from a disk may have no store */ } },
  };

  const THEMES = ['auto', 'light', 'dark'];
  const theme = document.getElementById('theme');
  const wear = (name) => {
    if (name === 'auto') delete root.dataset.theme; else root.dataset.theme = name;
    theme.textContent = `Theme: ${name}`;
  };
  wear(THEMES.includes(remembered.get('theme')) ? remembered.get('theme') : 'auto');
  theme.hidden = false;
  theme.addEventListener('click', () => {
    const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? 'auto') + 1) % THEMES.length];
    remembered.set('theme', next);
    wear(next);
  });

  // A chart tells the values at the step under the pointer, or at the one that the arrow keys went to.
  const readable = (value) => (Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(Number(value.toPrecision(4))));
  const follow = (figure) => {
    const { box: [left, top, width, height], steps: [low, high], curves } = JSON.parse(figure.dataset.chart);
    const svg = figure.querySelector('svg.plot');
    const output = figure.querySelector('output');
    const all = [...new Set(curves.flatMap((curve) => curve.points.map((point) => point[0])))].sort((a, b) => a - b);
    const line = document.createElementNS('http://www.w3.org/2000/svg', 'line');
    line.classList.add('cursor');
    let place = -1;
    const show = (next) => {
      place = Math.max(0, Math.min(all.length - 1, next));
      const step = all[place];
      const x = left + ((step - low) / (high - low)) * width;
      for (const [name, value] of Object.entries({ x1: x, x2: x, y1: top, y2: top + height })) line.setAttribute(name, value);
      svg.append(line);
      const told = curves.map((curve) => [curve.label, curve.points.find((point) => point[0] === step)]).filter(([, point]) => point);
      output.textContent = `step ${step}: ${told.map(([label, point]) => `${label} ${readable(point[1])}`).join(', ')}`;
    };
    const nearest = (event) => {
      const area = svg.getBoundingClientRect();
      const step = low + ((((event.clientX - area.left) / area.width) * svg.viewBox.baseVal.width - left) / width) * (high - low);
      show(all.reduce((best, value, index) => (Math.abs(value - step) < Math.abs(all[best] - step) ? index : best), 0));
    };
    svg.addEventListener('pointermove', nearest);
    svg.addEventListener('pointerdown', nearest);
    svg.addEventListener('pointerleave', () => { line.remove(); output.textContent = ''; });
    figure.addEventListener('keydown', (event) => {
      const to = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: all.length - 1, PageUp: place + 10, PageDown: place - 10 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      show(to);
    });
  };

  // Samples are filtered by how their answers fare and by what they say; so many are shown at a time.
  const AT_ONCE = 20;
  const sift = (part) => {
    const [fate, words, more, told] = ['select', 'input', 'button', 'output'].map((name) => part.querySelector(`.tools ${name}`));
    const samples = [...part.querySelectorAll('.sample')];
    let most = AT_ONCE;
    const update = () => {
      const wanted = words.value.trim().toLowerCase();
      const fits = samples.filter((sample) => (fate.value === 'all' || sample.dataset.fate.split(' ').includes(fate.value)) && (!wanted || sample.textContent.toLowerCase().includes(wanted)));
      const shown = new Set(fits.slice(0, most));
      for (const sample of samples) sample.hidden = !shown.has(sample);
      told.textContent = `${shown.size} of ${fits.length}`;
      more.hidden = shown.size === fits.length;
    };
    const restart = () => { most = AT_ONCE; update(); };
    fate.addEventListener('change', restart);
    words.addEventListener('input', restart);
    more.addEventListener('click', () => { most += AT_ONCE; update(); });
    fate.closest('.tools').hidden = false;
    update();
  };

  const parts = (page) => [...page.querySelectorAll('main > section')];
  const sources = new Map(parts(document).map((part) => [part.id, part.outerHTML]));

  const enliven = (part) => {
    part.querySelectorAll('.chart').forEach(follow);
    part.querySelectorAll('.samples').forEach(sift);
  };
  enliven(document);

  // Paper shows all that is folded, but not every answer.
  let folded = [];
  addEventListener('beforeprint', () => { folded = [...document.querySelectorAll('details.print:not([open])')]; folded.forEach((each) => { each.open = true; }); });
  addEventListener('afterprint', () => folded.forEach((each) => { each.open = false; }));

  // A page that is served asks now and then whether there is news, and takes over the parts that changed.
  if (root.dataset.watch) {
    const told = document.getElementById('watch');
    const main = document.querySelector('main');
    let tag = null;
    const replace = (part) => {
      sources.set(part.id, part.outerHTML);
      const old = document.getElementById(part.id);
      const open = new Set([...(old?.querySelectorAll('details[open]') ?? [])].map((each) => each.dataset.name));
      part.querySelectorAll('details').forEach((each) => { if (open.has(each.dataset.name)) each.open = true; });
      const held = old?.contains(document.activeElement) ? document.activeElement.dataset.name : undefined;
      const fresh = document.adoptNode(part);
      if (old) old.replaceWith(fresh); else main.append(fresh);
      enliven(fresh);
      if (held !== undefined) fresh.querySelector(`[data-name="${CSS.escape(held)}"]`)?.focus({ preventScroll: true });
    };
    const refresh = async () => {
      const response = await fetch(location.pathname, { headers: tag ? { 'If-None-Match': tag } : {}, cache: 'no-store' });
      if (response.status !== 304) {
        if (!response.ok) throw new Error(response.statusText);
        tag = response.headers.get('ETag');
        const next = new DOMParser().parseFromString(await response.text(), 'text/html');
        const wanted = parts(next).map((part) => part.id);
        parts(next).filter((part) => sources.get(part.id) !== part.outerHTML).forEach(replace);
        parts(document).filter((part) => !wanted.includes(part.id)).forEach((part) => part.remove());
        if (parts(document).some((part, index) => part.id !== wanted[index])) wanted.forEach((id) => main.append(document.getElementById(id)));
        for (const id of ['state', 'contents']) document.getElementById(id).replaceWith(document.adoptNode(next.getElementById(id)));
        document.title = next.title;
      }
      told.textContent = 'live';
    };
    const keep = async () => {
      try { await refresh(); } catch { told.textContent = 'not connected'; }
      setTimeout(keep, Number(root.dataset.watch) * 1000);
    };
    keep();
  }
}
