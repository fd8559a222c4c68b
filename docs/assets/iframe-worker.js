// The theme searches in a Worker, which browsers refuse to a page that was opened from disk. There, a hidden frame does it.
class FrameWorker extends EventTarget {
  constructor(url) {
    super();
    this.onmessage = null;
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    this.ready = new Promise((done) => {
      if (document.body) done();
      else document.addEventListener("DOMContentLoaded", done);
    }).then(() => this.start(url));
  }

  start(url) {
    document.body.append(this.frame);
    const inside = this.frame.contentWindow;
    const load = (address) =>
      new Promise((done, failed) => {
        const script = inside.document.createElement("script");
        script.src = address;
        script.onload = () => done();
        script.onerror = () => failed(new Error(`cannot load ${address}`));
        inside.document.body.append(script);
      });
    inside.importScripts = (...addresses) =>
      addresses.reduce((before, address) => before.then(() => load(address)), Promise.resolve());
    inside.postMessage = (data) => {
      const event = new MessageEvent("message", { data });
      this.dispatchEvent(event);
      this.onmessage?.(event);
    };
    return load(url).then(() => inside);
  }

  postMessage(data) {
    this.ready.then((inside) => inside.dispatchEvent(new inside.MessageEvent("message", { data })));
  }

  terminate() {
    this.frame.remove();
  }
}

if (location.protocol === "file:") window.Worker = window.IFrameWorker = FrameWorker;
