"use strict";
// Copies what stands before a button. Where the clipboard is refused, the text is selected, ready for Ctrl-C.
for (const button of document.querySelectorAll("button.copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const source = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(source);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}
// Shows the images of a card at full size; Escape, or a click on the button, closes.
const dialog = document.querySelector("dialog");
for (const button of document.querySelectorAll("button.full")) {
  button.hidden = false;
  const card = button.closest("figure");
  const open = () => {
    const row = dialog.querySelector("div");
    row.replaceChildren(...[...card.querySelectorAll("img")].map((image) => {
      const figure = document.createElement("figure");
      const caption = document.createElement("figcaption");
      caption.textContent = image.alt;
      figure.append(image.cloneNode(), caption);
      return figure;
    }));
    dialog.showModal();
  };
  button.addEventListener("click", open);
  for (const image of card.querySelectorAll("img")) image.addEventListener("click", open);
}
// Paper unfolds nothing.
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
});
