// Renews the part of the page marked data-refresh every few seconds, while somebody looks at it. What is open stays open, what was
// scrolled stays there, and nothing moves under the hand of whoever is on an element inside it, or has filled in a form.
"use strict";

const EVERY_MS = 4000;

async function renew() {
  const shown = document.querySelector("[data-refresh]");
  if (!shown || document.hidden) return;
  const focused = document.activeElement;
  if (shown.contains(focused) && focused.matches("summary, a, input, select")) return;
  if ([...shown.querySelectorAll("input")].some((each) => each.value !== each.defaultValue || each.checked !== each.defaultChecked)) return;
  let answer;
  try {
    answer = await fetch(location.href, { headers: { accept: "text/html" } });
  } catch {
    return document.body.classList.add("stale"); // the console has ended; the next success says otherwise
  }
  document.body.classList.toggle("stale", !answer.ok);
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = page.getElementById(shown.id);
  if (!fresh) return;
  for (const each of shown.querySelectorAll("details[open][id]")) fresh.querySelector(`#${each.id}`)?.setAttribute("open", "");
  const moved = new Map([...shown.querySelectorAll(".scroll")].map((each) => [each.ariaLabel, each.scrollLeft]));
  document.title = page.title;
  shown.replaceWith(document.adoptNode(fresh));
  for (const each of fresh.querySelectorAll(".scroll")) each.scrollLeft = moved.get(each.ariaLabel) ?? each.scrollLeft;
}

setInterval(renew, EVERY_MS);
document.addEventListener("visibilitychange", renew);
for (const select of document.querySelectorAll(".filters select")) select.addEventListener("change", () => select.form.requestSubmit());
