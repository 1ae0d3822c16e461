#include "sentences/sentence_words.hpp"

#include <initializer_list>
#include <string>
#include <unordered_map>
#include <unordered_set>

namespace taco {
namespace {

// One string per family of languages, words separated by spaces, each without its last full stop. Single letters and
// letters with full stops between them (U.S, Ph.D) need no entry, unless they never end a sentence.
constexpr std::string_view kTitles[] = {
    // English
    "Mr Mrs Ms Messrs Mx Dr Drs Prof Rev Revd Hon Gen Brig Col Maj Capt Cpt Lieut Lt Cmdr Cdr Sgt Cpl Pvt Adm Gov "
    "Sen Rep Pres Supt Insp Esqr Msgr Asst Assoc Det Supp vs viz cf e.g i.e ie eg ibid approx incl esp resp ca "
    "circa Cf Viz Vs E.g I.e",
    // German, Dutch, Scandinavian
    "Hr Hrn Fr Frl Dipl Ing Mag Geb geb gest bzw vgl Vgl ggf evtl inkl exkl sog bspw insb usf zzgl abzgl u.a z.B "
    "Z.B d.h D.h u.U z.T i.d.R o.ä dhr Dhr mevr Mevr drs bijv m.b.t o.a d.w.z bl.a t.ex f.eks t.d dvs kl",
    // French, Italian, Spanish, Portuguese, Romanian, Catalan
    "Mme Mlle MM dott sig avv ing prof Mgr Vve Ste Sig Sigg Dott Avv Gent Egr Sra Srta Sres Dra Ud Uds Vd Vds Dña "
    "Exmo Exma Ilmo Profa p.ej p.ex Ej dna",
    // Slavic, Greek, in their own scripts and in Latin script
    "г-н г-жа проф акад доц им ул просп пер пл обл р-н см Ср ср т.е т.к т.н напр рис гл např tj tzv tzn np prof mgr "
    "inż hab ul κ κα π.χ δηλ βλ",
    // Turkish, Hindi, Indonesian
    "Sn Doç Yrd Av Bkz bkz örn डॉ श्री प्रो Tn Ny Yth dll",
};
constexpr std::string_view kCounters[] = {
    "No no Nos nos Nr nr Num Núm núm N° n° Vol vol Vols vols Fig fig Figs figs Eq eq Eqs Sec sec Sect sect Ch ch "
    "Chap chap Art art Arts Pt pt Bk bk Ps App Ex ex Ver ver Cap cap Op op Tab tab Abb abb Bd Abs Kap S Str str pp "
    "p pág págs pag par Par sp Lib lib Act Sc vv ll fol fols стр рис гл табл č čl odst ст",
    "Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec janv févr avr juil sept oct nov déc ene feb abr",
};
constexpr std::string_view kCompanies[] = {
    "Jr Sr St Mt Ft Br Esq Inc Ltd Co Cos Corp Bros LLC Plc Univ Dept Assn Ave Blvd Rd Sq Bldg Hwy Pl al ed eds "
    "trans Mon Tue Tues Wed Thu Thur Thurs Fri Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec Ala Ariz Ark Calif "
    "Colo Conn Del Fla Ga Ill Ind Kan Ky Mass Mich Minn Miss Mo Mont Neb Nev Okla Ore Pa Penn Tenn Tex Va Vt Wash "
    "Wis Wyo Wm Geo Chas Thos Jas Jno Robt Edw Benj Gr Lat Heb Eng Ger Cic Cie Ges Hrsg Aufl",
};
constexpr std::string_view kStarters[] = {
    "The This That These Those There Then Thus They Their Thou He She It Its We You Your My His Her Our I If In On "
    "At An And But Or Nor So Yet For From By To With Of As After Before When While Where Why What Which Who How "
    "Here Now No Not Yes Oh Ah Well All Some Many Most Such Each Every Once One Two Both Under Upon Since Until "
    "During However Although Though Because Is Are Was Were Do Does Did Have Has Had Can Could Will Would Shall "
    "Should May Might Must Let Never",
    "Der Das Ein Eine Er Sie Es Wir Ich Und Aber Doch Dann Diese Dieser Dieses Wenn Nach Bei Auf Mit Het Een Hij "
    "Zij Det Den Han Hun Vi",
    "Il Elle Ils Elles Nous Vous Mais Cette Ces Dans Je Un Une Una Uno Pero Esto Esta Este Ella Ellos Questo Questa "
    "Mas Ele Ela Eles",
    "Потом Затем Тогда Он Она Они Оно Это Эти Мы Вы Но На По Если Когда Как Что То Так Αυτό Αυτός Και",
};
constexpr std::string_view kAfterOrdinals[] = {
    "Januar Jänner Februar März April Mai Juni Juli August September Oktober November Dezember Jahrhundert "
    "Jahrhunderts Jahrhunderte Jh Jhd Jahrtausend Klasse Kapitel Auflage Januari Februari Maart",
};

using Words = std::unordered_set<std::string_view>;
using Kinds = std::unordered_map<std::string_view, WordKind>;

template <typename Add>
void for_each_word(std::string_view list, Add add) {
  while (!list.empty()) {
    const size_t size = list.find(' ') == std::string_view::npos ? list.size() : list.find(' ');
    if (size > 0) add(list.substr(0, size));
    list.remove_prefix(size == list.size() ? size : size + 1);
  }
}

template <size_t size>
Words to_set(const std::string_view (&lists)[size]) {
  Words words;
  for (const std::string_view list : lists) for_each_word(list, [&](std::string_view word) { words.insert(word); });
  return words;
}

Kinds make_kinds() {
  Kinds kinds;
  const auto add_all = [&](std::string_view list, WordKind kind) {
    for_each_word(list, [&](std::string_view word) { kinds.emplace(word, kind); });
  };
  for (const std::string_view list : kTitles) add_all(list, WordKind::title);
  for (const std::string_view list : kCompanies) add_all(list, WordKind::company);
  for (const std::string_view list : kCounters) add_all(list, WordKind::counter);
  return kinds;
}

bool is_upper(char letter) { return letter >= 'A' && letter <= 'Z'; }

// MESSRS -> Messrs; empty if the word is not all capitals.
std::string capitalised(std::string_view word) {
  if (word.size() < 2) return {};
  std::string result(word);
  for (size_t i = 0; i < word.size(); ++i) {
    if (!is_upper(word[i])) return {};
    if (i > 0) result[i] = static_cast<char>(word[i] - 'A' + 'a');
  }
  return result;
}

}  // namespace

WordKind abbreviation_kind(std::string_view word) {
  static const Kinds kinds = make_kinds();
  auto found = kinds.find(word);
  if (found == kinds.end()) found = kinds.find(capitalised(word));
  return found == kinds.end() ? WordKind::ordinary : found->second;
}

bool begins_sentences(std::string_view word) {
  static const Words starters = to_set(kStarters);
  return starters.count(word) > 0;
}

bool follows_ordinal(std::string_view word) {
  static const Words words = to_set(kAfterOrdinals);
  return words.count(word) > 0;
}

}  // namespace taco
