// Reading values off the charts. Inlined into the page by sana/run/report_page.py; the page is complete without it.

for (const figure of document.querySelectorAll('.chart')) {
  const {x: [left, right, low, high], lines} = JSON.parse(figure.querySelector('script').textContent);
  const svg = figure.querySelector('svg'), tip = figure.querySelector('.tip'), cursor = figure.querySelector('.cursor');
  const nearest = (xs, x) => xs.reduce((best, v, i) => Math.abs(v - x) < Math.abs(xs[best] - x) ? i : best, 0);
  const hide = () => { tip.hidden = true; cursor.style.visibility = 'hidden'; };
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    const px = (event.clientX - box.left) / scale;
    if (px < left || px > right || !lines.length) return hide();
    const anchor = lines.reduce((a, b) => b.x.length > a.x.length ? b : a);
    const x = anchor.x[nearest(anchor.x, low + (px - left) / (right - left) * (high - low))];
    tip.textContent = '';
    const add = text => { const row = document.createElement('div'); row.textContent = text; tip.append(row); };
    add('update ' + x.toLocaleString('en'));
    for (const line of lines) add(line.n + ': ' + line.y[nearest(line.x, x)]);
    const at = left + (x - low) / (high - low) * (right - left);
    cursor.setAttribute('x1', at); cursor.setAttribute('x2', at); cursor.style.visibility = 'visible';
    tip.hidden = false;
    const place = at * scale + 12;
    tip.style.left = (place + tip.offsetWidth > box.width ? at * scale - tip.offsetWidth - 12 : place) + 'px';
  });
  svg.addEventListener('pointerleave', hide);
}
