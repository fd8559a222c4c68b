// The copy button of a block that shows commands with their output copies the commands alone; output has no button.
document.addEventListener("DOMContentLoaded", () => {
  for (const code of document.querySelectorAll("pre > code")) {
    const lines = code.textContent.replace(/\n$/, "").split("\n");
    const block = code.closest(".highlight, pre");
    const isOutput = block.classList.contains("language-text");
    if (isOutput) code.parentElement.classList.add("no-copy");
    if (isOutput || !lines.some((line) => line.startsWith("$ "))) continue;
    const commands = [];
    let goesOn = false;
    for (const line of lines) {
      if (goesOn || line.startsWith("$ ")) {
        commands.push(goesOn ? line : line.slice(2));
        goesOn = line.endsWith("\\");
      }
    }
    code.dataset.commands = commands.join("\n") + "\n";
  }
  // The theme makes its buttons a little later, and asks each for its text when it is clicked.
  const tell = () => {
    for (const button of document.querySelectorAll("[data-clipboard-target]")) {
      const code = document.querySelector(button.dataset.clipboardTarget);
      if (code?.parentElement.classList.contains("no-copy")) button.remove();
      else if (code?.dataset.commands) button.dataset.clipboardText = code.dataset.commands;
    }
  };
  new MutationObserver(tell).observe(document.body, { childList: true, subtree: true });
  tell();
});
