(() => {
  "use strict";
  const root = document.documentElement;
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const places = [...document.querySelectorAll(".plot")];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)");
  const titles = { generation: "generation", time: "time", steps: "environment steps" };
  let axis = document.querySelector("#axes .on")?.dataset.axis ?? "generation";

  const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const named = (which) => (which === "dim" ? color("dim") : color(`c${which % 8}`));
  const clear = (hex, alpha) => {
    const parts = [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
    return `rgba(${parts.join(",")},${alpha})`;
  };
  // plotly reads some tags and entities in its texts
  const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const short = (text) => (text.length > 44 ? `${text.slice(0, 43)}…` : text);

  const units = (plot) => {
    const most = Math.max(0, ...plot.traces.flatMap((trace) => trace.x.time));
    return most > 7200 ? [3600, "hours"] : most > 120 ? [60, "minutes"] : [1, "seconds"];
  };

  const draw = (place) => {
    const plot = plots[Number(place.dataset.plot)];
    const [unit, word] = units(plot);
    const traces = plot.traces.map((trace) => {
      const shade = named(trace.color);
      const points = trace.x[axis];
      const few = points.length < 2;
      const markers = few || (trace.markers && points.length <= 150);
      return {
        type: "scatter",
        x: axis === "time" ? points.map((value) => value / unit) : points,
        y: trace.y,
        name: plain(short(trace.name)),
        mode: trace.edge || trace.fill ? "lines" : markers ? "lines+markers" : "lines",
        line: { color: shade, width: trace.edge || trace.fill ? 0 : 2, dash: trace.dash ? "dot" : "solid" },
        marker: { color: shade, size: 6 },
        fill: trace.fill ? "tonexty" : "none",
        fillcolor: trace.fill ? clear(shade, trace.fill) : undefined,
        showlegend: !trace.edge,
        hoverinfo: trace.edge || trace.fill ? "skip" : undefined,
        hovertemplate: trace.edge || trace.fill ? undefined : "%{y:.5~g}",
      };
    });
    const faint = color("line");
    const layout = {
      margin: { l: 8, r: 10, t: 8, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("dim") },
      xaxis: {
        title: { text: axis === "time" ? word : titles[axis], standoff: 6 },
        gridcolor: faint, linecolor: faint, zeroline: false, automargin: true, fixedrange: touch.matches,
        rangemode: axis === "generation" ? "normal" : "tozero",
        ...(axis === "generation" && Math.max(...plot.traces.flatMap((t) => t.x.generation)) < 8 ? { dtick: 1 } : {}),
      },
      yaxis: { gridcolor: faint, linecolor: faint, zeroline: false, automargin: true, fixedrange: touch.matches, nticks: 6,
        rangemode: plot.zero ? "tozero" : "normal" },
      hovermode: "x unified",
      hoverlabel: { bgcolor: color("paper"), bordercolor: faint, font: { color: color("ink") } },
      showlegend: plot.traces.filter((trace) => !trace.edge).length > 1,
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
      dragmode: touch.matches ? false : "zoom",
      shapes: plot.lines.map((line) => ({
        type: "line", xref: "paper", x0: 0, x1: 1, y0: line.y, y1: line.y,
        line: { color: color("dim"), width: 1, dash: "dash" },
      })),
      annotations: plot.lines.filter((line) => line.text).map((line) => ({
        xref: "paper", x: 1, xanchor: "right", y: line.y, yanchor: "bottom", showarrow: false, text: plain(line.text),
        font: { size: 11, color: color("dim") },
      })),
    };
    // a line that is far from the curves would otherwise be outside of the plot
    if (plot.lines.length) {
      const invisible = plot.lines.map((line) => line.y);
      const first = traces[0]?.x[0] ?? 0;
      traces.push({
        type: "scatter", x: invisible.map(() => first), y: invisible, mode: "markers", marker: { opacity: 0 },
        hoverinfo: "skip", showlegend: false,
      });
    }
    const settings = { displaylogo: false, responsive: true, displayModeBar: false, doubleClick: "reset" };
    return Plotly.react(place, traces, layout, settings);
  };

  const all = () => Promise.all(places.map(draw));

  const unpack = async () => {
    const packed = atob(document.getElementById("plotly").textContent);
    const bytes = Uint8Array.from(packed, (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };

  const start = async () => {
    if (places.length) {
      await unpack();
      await all();
      dark.addEventListener("change", all);
      const axes = document.getElementById("axes");
      axes.hidden = false;
      axes.addEventListener("click", (event) => {
        const button = event.target.closest("button");
        if (!button) return;
        axis = button.dataset.axis;
        for (const other of axes.children) other.classList.toggle("on", other === button);
        all();
      });
    }
    root.dataset.drawn = String(places.length);
  };

  const kinds = document.getElementById("kinds");
  if (kinds) {
    kinds.hidden = false;
    kinds.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      for (const other of kinds.children) other.classList.toggle("on", other === button);
      const wanted = button.dataset.kind, others = document.getElementById("others");
      if (others && wanted) others.open = true;
      for (const article of document.querySelectorAll(".answers article")) {
        article.hidden = Boolean(wanted) && !article.classList.contains(wanted);
      }
    });
  }

  start().catch((error) => {
    root.dataset.drawn = "failed";
    const line = document.createElement("p");
    line.className = "note";
    line.textContent = `The curves cannot be drawn in this browser (${error}); everything else is there.`;
    document.querySelector("h2")?.after(line);
    console.error(error);
  });
})();
